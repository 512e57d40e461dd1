"""Which file to ship, and whether QAT was worth it over PTQ.

An integer file is preferred, whatever it costs; one that fails inspection or parity cannot ship.  QAT must
beat PTQ by more than a margin: below it the simpler file ships.  The margin is the rule; stated beside it is
the binomial standard error of the difference, `100 * sqrt(p (1 - p) / n + q (1 - q) / m)` points.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mobileqat.report.formats import percent, place
from mobileqat.report.results import (
    VARIANTS,
    accuracy,
    cost_places,
    cost_ratio,
    difference_points,
    file_name,
    number,
    present_variants,
    ratio,
    standard_error_points,
)

# A loss against float above this many points is said in the headline.
NOTABLE_LOSS_POINTS = 1.0


def decide(variants: Mapping[str, Any], margin_points: float) -> dict[str, Any]:
    """The verdict on one run.

    Args:
        variants: `results["variants"]`: "float", "ptq", "qat", of which any may be missing.
        margin_points: percentage points of accuracy by which QAT must exceed PTQ to ship in its place.

    Returns:
        "ship": "qat", "ptq", "float" or None (nothing was evaluated); "file"; "headline"; "qat_worth_it",
        None unless both integer files can ship; "reasons", sentences.
    """
    variants = present_variants(variants)
    integer: list[str] = [name for name in ("ptq", "qat") if name in variants]
    obstacles = {name: list(_obstacles(name, variants[name])) for name in integer}
    able = [name for name in integer if not obstacles[name]]
    blocked = [name for name in integer if obstacles[name]]
    why_blocked = [reason for name in blocked for reason in obstacles[name]]
    gain = _gain(variants) if len(able) == 2 else None
    worth_it = None if gain is None else gain > margin_points
    ship = ("qat" if worth_it else "ptq") if len(able) == 2 else able[0] if able else "float"
    if accuracy(variants.get(ship)) is None:
        headline = "No verdict: no file was evaluated."
        return {"ship": None, "file": None, "headline": headline, "qat_worth_it": None, "reasons": why_blocked}
    reasons = [*_gain_reasons(variants, gain, margin_points), *_absences(variants), *why_blocked]
    other = _instead(ship, gain, margin_points) or _blocked(variants, blocked)
    return {
        "ship": ship,
        "file": file_name(ship, variants[ship]),
        "headline": _headline(ship, variants, other),
        "qat_worth_it": worth_it,
        "reasons": [*reasons, *_reservations(ship, variants)],
    }


def _obstacles(name: str, variant: Mapping[str, Any]) -> Iterator[str]:
    """Why an integer file cannot ship."""
    file, inspection, parity = file_name(name, variant), variant.get("inspection"), variant.get("parity")
    if not inspection:
        yield f"{file} cannot ship, it was not inspected."
    elif not inspection.get("fully_integer") and not inspection.get("excluded"):
        yield f"{file} cannot ship, it is not fully integer{_first_problem(inspection)}."
    elif inspection.get("problems"):
        yield f"{file} cannot ship, it did not pass inspection{_first_problem(inspection)}."
    if parity and not parity.get("passed"):
        yield f"{file} cannot ship, it does not match its simulation{_first_problem(parity)}."
    if accuracy(variant) is None:
        yield f"{file} cannot ship, it was not evaluated."


def _first_problem(check: Mapping[str, Any]) -> str:
    problems = check.get("problems") or []
    return f": {problems[0].rstrip('.')}" if problems else ""


def _gain(variants: Mapping[str, Any]) -> float | None:
    return difference_points(accuracy(variants.get("qat")), accuracy(variants.get("ptq")))


def _gain_reasons(variants: Mapping[str, Any], gain: float | None, margin_points: float) -> Iterator[str]:
    if gain is None:
        return
    qat, ptq = variants["qat"], variants["ptq"]
    relation = "more than" if gain > margin_points else "not more than"
    yield (
        f"QAT reaches {percent(accuracy(qat))} and PTQ {percent(accuracy(ptq))}: {_more_or_less(gain)}, "
        f"{relation} the margin of {margin_points:.2f}."
    )
    errors = [standard_error_points(accuracy(v), number(v, "accuracy", "samples")) for v in (qat, ptq)]
    if None in errors:
        return
    error = math.hypot(*(value for value in errors if value is not None))
    size = "larger than" if abs(gain) > error else "within"
    samples = qat["accuracy"]["samples"]
    yield (
        f"The standard error of that difference is {error:.2f} points (binomial, {samples:,} samples, files "
        f"taken as independent): the difference is {size} one standard error."
    )


def _more_or_less(gain: float) -> str:
    if round(gain, 2) == 0:
        return "no difference"
    return f"{abs(gain):.2f} points {'more' if gain > 0 else 'less'}"


def _absences(variants: Mapping[str, Any]) -> Iterator[str]:
    for name in ("ptq", "qat"):
        if name not in variants:
            yield f"The run has no {VARIANTS[name]} file."


def _reservations(ship: str, variants: Mapping[str, Any]) -> Iterator[str]:
    """What to know about the file that ships."""
    losses = {name: _loss(name, variants) for name in ("ptq", "qat")}
    large = [f"{VARIANTS[n]} {loss:.2f}" for n, loss in losses.items() if loss and loss > NOTABLE_LOSS_POINTS]
    if large:
        yield f"Loses more than {NOTABLE_LOSS_POINTS:.2f} point against float: {', '.join(large)} points."
    yield from _no_better_than_one_answer(variants.get("float") or {})
    if ship != "float" and (costs := _costs_more(variants[ship], variants.get("float"))):
        yield (
            f"{file_name(ship, variants[ship])} is {costs} than the float file here. It ships as the integer file; "
            "measure on the target before you decide."
        )
    if ship != "float" and not variants[ship].get("parity"):
        yield f"{file_name(ship, variants[ship])} was not compared with its simulation."


def _no_better_than_one_answer(variant: Mapping[str, Any]) -> Iterator[str]:
    """A float model that has learned nothing makes every comparison with it empty."""
    rows, reached = variant.get("per_class") or [], accuracy(variant)
    samples = sum(row["samples"] for row in rows)
    if len(rows) < 2 or not samples or reached is None:
        return
    largest = max(rows, key=lambda row: row["samples"])
    share = largest["samples"] / samples
    if reached <= share:
        yield (
            f"The float model reaches {percent(reached)}, no more than the answer '{largest['class']}' to every sample "
            f"would ({percent(share)}): it has not learned its task, and a comparison with it says nothing."
        )


def _costs_more(shipped: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    size = ratio(number(shipped, "size_bytes"), number(reference, "size_bytes"))
    slowdown = next(filter(None, (cost_ratio(shipped, reference, w) for w in cost_places({"": shipped}, "ms"))), None)
    found = {"larger": size, "slower": slowdown}
    return " and ".join(word for word, value in found.items() if value is not None and round(value, 2) > 1)


def _loss(name: str, variants: Mapping[str, Any]) -> float | None:
    return difference_points(accuracy(variants.get("float")), accuracy(variants.get(name)))


def _headline(ship: str, variants: Mapping[str, Any], other: str) -> str:
    """`other`: what to say of the files that do not ship."""
    file, share = file_name(ship, variants[ship]), percent(accuracy(variants[ship]))
    if ship == "float":
        return f"Ship {file}: {share}; {other or 'the run has no integer file'}."
    loss = _loss(ship, variants)
    is_notable = loss is not None and loss > NOTABLE_LOSS_POINTS
    warning = f", but it loses {loss:.2f} points against float" if is_notable else ""
    beside = [_beside_float(loss)] if loss is not None and not is_notable else []
    facts = ", ".join([share, *beside, *_ratios_to_float(ship, variants)])
    return f"Ship {file}{warning}: {facts}{'; ' if other else ''}{other}."


def _beside_float(loss: float) -> str:
    if round(loss, 2) == 0:
        return "equal to float"
    return f"{abs(loss):.2f} points {'below' if loss > 0 else 'above'} float"


def _ratios_to_float(ship: str, variants: Mapping[str, Any]) -> Iterator[str]:
    shipped, reference = variants[ship], variants.get("float")
    size = ratio(number(shipped, "size_bytes"), number(reference, "size_bytes"))
    if size is not None:
        yield f"{100 * size:.0f} % of the size"
    for where in cost_places({ship: shipped}, "ms"):
        slowdown = cost_ratio(shipped, reference, where)
        if slowdown:
            yield f"{_speed(1 / slowdown)} ({place(*where)})"
            return


def _speed(speed: float) -> str:
    if f"{speed:.2f}" == "1.00":
        return "as fast as float"
    return f"{speed:.2f}x faster than float" if speed > 1 else f"{1 / speed:.2f}x slower than float"


def _instead(ship: str, gain: float | None, margin_points: float) -> str:
    """What the other integer file would have meant, when both can ship."""
    if gain is None:
        return ""
    if ship == "qat":
        return f"QAT gains {gain:.2f} points over PTQ"
    within = f", within the margin of {margin_points:.2f}" if round(gain, 2) > 0 else ""
    return f"QAT was not needed ({_more_or_less(gain)}{within})"


def _blocked(variants: Mapping[str, Any], names: list[str]) -> str:
    files = " and ".join(file_name(name, variants[name]) for name in names)
    return f"{files} did not pass {'its' if len(names) == 1 else 'their'} checks" if names else ""
