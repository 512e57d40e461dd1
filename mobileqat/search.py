"""Mixed precision: which layers get few bits, under a budget of bytes or of measured time.

The noise that each choice for each layer adds to the model's output, all others at the first choice, is measured once;
noises of several layers are taken to add up, as in HAWQ-V2 (Dong et al. 2020).  Then the change that saves most for the
noise it adds is made, again and again until none is left: a path of mixtures from large to small.  Each is run as a
whole, and the one with the best metric inside the budget is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobileqat.analyze import Metric, SwitchedModel
from mobileqat.errors import MobileQatError
from mobileqat.plan import AGAIN, matches
from mobileqat.progress import track
from mobileqat.quantize import QuantizedModel

FLOAT = "float"
Costs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Mixture:
    """A choice for every layer with weights.

    Args:
        choices: scheme, or "float", by operator.
        cost: what the budget counts, predicted.
        metric: of the simulated model on the samples.
    """

    choices: dict[str, str]
    cost: float
    metric: float

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        """The choices, hashable."""
        return tuple(self.choices.items())


@dataclass(frozen=True)
class Budget:
    """An upper bound, absolute or a share of what the first scheme costs everywhere.

    Args:
        what: "size" in bytes, or "cost" in milliseconds of one inference.
        amount: of it.
        is_share: whether `amount` is a share.
        text: as it was written.
    """

    what: str
    amount: float
    is_share: bool
    text: str

    def bound(self, whole: float) -> float:
        return self.amount * whole if self.is_share else self.amount


_UNITS = {"size": {"%": 0.01, "kB": 1e3, "MB": 1e6, "B": 1.0, "": 1.0}, "cost": {"%": 0.01, "ms": 1.0, "": 1.0}}


def parse_budget(text: str) -> Budget:
    """Reads "size=60kB", "size=60%", "cost=0.5ms" or "cost=80%".

    Raises:
        MobileQatError: anything else.
    """
    match = re.fullmatch(r"(size|cost)=([0-9.]+) ?(%|[A-Za-z]*)", text)
    try:
        what, number, unit = match.groups() if match else ("size", "0", "")
        amount = float(number) * _UNITS[what].get(unit, 0.0)
    except ValueError:
        amount = 0.0
    if not amount > 0:
        raise MobileQatError(
            f"Not a budget: {text!r}. Expected a size in B, kB, MB or % of the first scheme's, such as size=60kB or "
            "size=60%, or a cost in ms or %, such as cost=0.5ms or cost=80%."
        )
    return Budget(what, amount, unit == "%", text.partition("=")[2])


@dataclass(frozen=True)
class Search:
    """What `search` found.

    Args:
        noise: by layer and choice, power of the outputs' errors over that of the outputs, with only this layer changed.
        front: mixtures of which none is beaten in both cost and metric, the most expensive one first.
        chosen: the one inside the budget with the best metric.
    """

    noise: dict[str, dict[str, float]]
    front: tuple[Mixture, ...]
    chosen: Mixture


def search(
    models: Mapping[str, QuantizedModel],
    costs: Costs,
    budget: float,
    samples: Any,
    metric: Metric,
    base_cost: float = 0.0,
    batch_size: int = 64,
    unit: str = "",
) -> Search:
    """Chooses a scheme for every layer with weights; one that is called several times has the same in all its places.

    Args:
        models: the same float model quantized as a whole, by scheme, calibrated; the first is where the search starts.
        costs: what each operator costs, by scheme; an entry "float" lets layers stay in float.
        budget: upper bound of the sum.
        samples: an array [n, ...], or a list or dict of arrays for several inputs.
        metric: of the model's first output on the samples; more is better.
        base_cost: what is paid whatever is chosen.
        batch_size: samples that run together.
        unit: of the budget, for messages.

    Raises:
        MobileQatError: nothing fits the budget, fewer than two choices, or schemes of different activations.
    """
    names = [*models, *([FLOAT] if FLOAT in costs else [])]
    if len(names) < 2:
        raise MobileQatError(f"A search needs at least two schemes to choose from. Received: {', '.join(names)}")
    if len({model.plan.scheme.activations for model in models.values()}) > 1:
        raise MobileQatError(f"Schemes to choose from must have the same activations. Received: {', '.join(models)}")
    switched = SwitchedModel(*models.values())
    uses = _uses(next(iter(models.values())), FLOAT in names)
    numbers = {name: index for index, name in enumerate(models, 1)} | {FLOAT: 0}

    def everywhere(choices: Mapping[str, str]) -> dict[str, str]:
        return {operator: choice for layer, choice in choices.items() for operator in uses[layer]}

    def outputs(choices: Mapping[str, str]) -> list[np.ndarray]:
        vector = dict.fromkeys(switched.operators, 1) | {op: numbers[c] for op, c in everywhere(choices).items()}
        return switched.predict_all(samples, vector, batch_size)

    start = dict.fromkeys(uses, names[0])
    real = switched.predict_all(samples, {}, batch_size)
    noise = {
        layer: {name: _noise(real, outputs(start | {layer: name})) for name in names}
        for layer in track(uses, "noise of each layer", "layers")
    }
    sums = {name: {layer: sum(costs[name][op] for op in uses[layer]) for layer in uses} for name in names}
    path = _descend(start, noise, sums)
    mixtures = [
        Mixture(everywhere(m), base_cost + _cost(m, sums), metric(outputs(m)[0]))
        for m in track(path, "mixtures", "mixtures")
    ]
    fitting = [mixture for mixture in mixtures if mixture.cost <= budget]
    if not fitting:
        least = min(mixture.cost for mixture in mixtures)
        raise MobileQatError(
            f"Nothing fits the budget of {budget:,.4g}{unit}: the smallest mixture of {', '.join(names)} takes "
            f"{least:,.4g}{unit}. Choose from schemes of fewer bits (--scheme), or allow more."
        )
    return Search(noise, _pareto(mixtures), max(fitting, key=lambda mixture: (mixture.metric, -mixture.cost)))


def _uses(model: QuantizedModel, with_float: bool) -> dict[str, list[str]]:
    """Operators with weights that are chosen together, by the first of them: those of one layer, which is stored once,
    and, since `exclude` takes all that lies below a path, those below each other ("sep/depthwise", "sep")."""
    groups: list[list[str]] = []
    for name, wrapper in model.operators.items():
        if wrapper.weight_spec is None:
            continue
        for names in groups:
            is_same = any(model.operators[other].layer is wrapper.layer for other in names)
            is_below = any(_takes(name, other) or _takes(other, name) for other in names)
            if is_same or (with_float and is_below):
                names.append(name)
                break
        else:
            groups.append([name])
    return {names[0]: names for names in groups}


def _noise(real: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> float:
    """Power of the error over that of the values, summed over a model's outputs."""
    pairs = zip(real, outputs, strict=True)
    return sum(float(np.mean(np.square(got - want)) / max(np.mean(np.square(want)), 1e-30)) for want, got in pairs)


def _cost(choices: Mapping[str, str], costs: Costs) -> float:
    return sum(costs[choice][layer] for layer, choice in choices.items())


def _descend(start: dict[str, str], noise: dict[str, dict[str, float]], costs: Costs) -> list[dict[str, str]]:
    """The start, the quietest mixture whatever it costs, and from there one change after the other."""
    current = {layer: min(noise[layer], key=lambda name: (noise[layer][name], costs[name][layer])) for layer in start}
    path = [start, current]
    while moves := list(_moves(current, noise, costs)):
        _, layer, name = min(moves)
        current = current | {layer: name}
        path.append(current)
    return path


def _moves(current: Mapping[str, str], noise: dict[str, dict[str, float]], costs: Costs):
    """Changes that save something: `(noise added per cost saved, layer, choice)`."""
    for layer, now in current.items():
        for name in noise[layer]:
            saved = costs[now][layer] - costs[name][layer]
            if saved > 0:
                yield (max(noise[layer][name] - noise[layer][now], 0.0) / saved, layer, name)


def _pareto(mixtures: Sequence[Mixture]) -> tuple[Mixture, ...]:
    front: list[Mixture] = []
    for mixture in sorted(mixtures, key=lambda m: (m.cost, -m.metric)):
        if not front or mixture.metric > front[-1].metric:
            front.append(mixture)
    return tuple(reversed(front))


# ------------------------------------------------------------------ what a mixture costs, and how it is written


def weight_bytes(models: Mapping[str, QuantizedModel], with_float: bool = False) -> dict[str, dict[str, float]]:
    """Bytes of every layer's kernel in the file, by scheme; those of a kernel that is stored once count once."""
    costs = {scheme: _kernel_bytes(model) for scheme, model in models.items()}
    if with_float:
        costs[FLOAT] = _kernel_bytes(next(iter(models.values())), bits=32)
    return costs


def _kernel_bytes(model: QuantizedModel, bits: int | None = None) -> dict[str, float]:
    stored: set[tuple[int, int]] = set()
    sizes = {}
    for name, wrapper in model.operators.items():
        if wrapper.weight_spec is None:
            continue
        kernel = (id(wrapper.layer), id(wrapper.batch_norm))  # folded with another BatchNormalization it is another
        width = wrapper.operator.storage_bits if bits is None else bits
        sizes[name] = 0.0 if kernel in stored else float(-(-int(np.prod(wrapper.layer.kernel.shape)) * width // 8))
        stored.add(kernel)
    return sizes


def options(choices: Mapping[str, str]) -> dict[str, Any]:
    """`scheme`, `layers` and `exclude` of `quantize_model`, or of a recipe, for a mixture: the most frequent scheme
    and, by pattern, the others."""
    schemes = [choice for choice in choices.values() if choice != FLOAT]
    scheme = max(dict.fromkeys(schemes), key=schemes.count) if schemes else "w8a8"
    others = {layer: choice for layer, choice in choices.items() if choice not in (FLOAT, scheme)}
    # What another's pattern takes, too, is named after it: the last pattern decides.
    taken = [
        layer
        for layer, choice in choices.items()
        if choice != FLOAT and any(layer != other and _takes(other, layer) for other in others)
    ]
    ordered = [*(layer for layer in others if layer not in taken), *sorted(taken, key=len)]
    return {
        "scheme": scheme,
        "layers": {_pattern(layer): choices[layer] for layer in ordered},
        "exclude": [_pattern(layer) for layer, choice in choices.items() if choice == FLOAT],
    }


def _pattern(name: str) -> str:
    """A pattern for this name; it takes what lies below, and further calls of the layer, too."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _takes(name: str, other: str) -> bool:
    """Whether the pattern for one name takes another."""
    return matches(other, _pattern(name)) or matches(AGAIN.sub("", other), _pattern(name))
