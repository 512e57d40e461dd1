"""From files and a target to records: statistics, ratios, operators, and agreement with the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mobileqat import flatbuffer
from mobileqat.bench.host import Host
from mobileqat.bench.record import (
    Agreement,
    Comparison,
    Job,
    Measurement,
    OperatorCost,
    Outcome,
    RatioSpread,
    Record,
    Settings,
    Target,
)
from mobileqat.bench.statistics import summarize
from mobileqat.errors import DelegationError, MobileQatError
from mobileqat.progress import task
from mobileqat.runtime import available_runtimes, random_samples, to_raw

MIN_TOP1_AGREEMENT = 0.98  # where kernels round in ways of their own
DEFAULT = Settings()
SAMPLES = 16  # fixed vectors whose outputs are compared with the host's


def measure(
    files: Mapping[str, bytes | str | Path],
    target: Target | None = None,
    settings: Settings = DEFAULT,
    *,
    samples: int = SAMPLES,
    vectors: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Comparison:
    """Measures files in turns on one target.

    Args:
        files: name -> path or bytes of a `.tflite` file; the first one is what ratios refer to.
        target: from `targets.parse_target`; this machine by default.
        settings: how to measure.
        samples: how many fixed random vectors, the same everywhere, have their outputs compared with the host's.
        vectors: what to compare on instead: name -> raw arrays, one [n, *shape of the tensor] per input of the file.

    Returns:
        A record per file. Operators are measured as models of their own where the target has no profiler.

    Raises:
        FlatbufferError: a file is broken.
        DeviceError: the target cannot carry it out.
    """
    if not files or settings.threads < 1 or settings.warmup < 0 or settings.runs < 1:
        raise MobileQatError(
            "Expected at least one file, threads >= 1, warmup >= 0 and runs >= 1. "
            f"Received: {len(files)} files, threads={settings.threads}, warmup={settings.warmup}, runs={settings.runs}."
        )
    target = target or Host()
    compares = (samples > 0 or vectors is not None) and target.computes and not isinstance(target, Host)
    models = {name: flatbuffer.read(source) for name, source in files.items()}
    inputs = vectors or {name: random_vectors(model, max(samples, 1)) for name, model in models.items()}
    jobs = [Job(name, model, tuple(inputs[name]), compares) for name, model in models.items()]
    with task(f"benchmark on {target.name}"):
        outcome = target.run(jobs, settings)
    expected = host_outputs(jobs, settings) if compares else [()] * len(jobs)
    if settings.profile and not target.has_profiler:
        outcome = _with_profiles(outcome, target, jobs, settings)
    records = {
        job.name: _record(target, settings, outcome, job, measured, outputs)
        for job, measured, outputs in zip(jobs, outcome.measurements, expected, strict=True)
    }
    first = outcome.measurements[0].costs
    ratios = {job.name: _ratio_spread(m.costs, first) for job, m in zip(jobs, outcome.measurements, strict=True)}
    return Comparison(records, ratios)


def predict(
    model: bytes | str | Path, target: Target, arrays: Sequence[np.ndarray], settings: Settings = DEFAULT
) -> tuple[np.ndarray, ...]:
    """Outputs of one file on a target.

    Args:
        arrays: raw, one [n, *shape of the tensor] per input of the file.

    Returns:
        One raw array [n, *shape of the tensor] per output.
    """
    job = Job("model", flatbuffer.read(model), tuple(arrays), wants_outputs=True, is_timed=False)
    with task(f"outputs on {target.name}"):
        return target.run([job], replace(settings, runs=0)).measurements[0].outputs


def random_vectors(model: flatbuffer.Model, count: int) -> list[np.ndarray]:
    """The same raw values in every call: [count, *shape of the tensor] per input of the file."""
    return [random_samples(flatbuffer.details(model.tensors[i]), count, whole=True) for i in model.inputs]


def raw_vectors(model: bytes | str | Path | flatbuffer.Model, *samples: np.ndarray) -> list[np.ndarray]:
    """Samples as a file takes them.

    Args:
        model: the file.
        samples: [n, ...] per input of the file, real values or raw ones.

    Returns:
        [n / batch, *shape of the tensor] per input; the last invocation is filled up with the first samples.

    Raises:
        DataError: another shape or dtype.
    """
    file = model if isinstance(model, flatbuffer.Model) else flatbuffer.read(model)
    rows = [flatbuffer.details(file.tensors[index]) for index in file.inputs]
    raw = [to_raw(np.asarray(values), row, quantize=True) for values, row in zip(samples, rows, strict=True)]
    return [np.resize(v, (-(-len(v) // row.shape[0]), *row.shape)) for v, row in zip(raw, rows, strict=True)]


def host_outputs(jobs: Sequence[Job], settings: Settings) -> list[tuple[np.ndarray, ...]]:
    """What this machine computes on the jobs' inputs, with the same kernels if it has them.

    The int8 kernels of tflite-runtime compute on ARM nearly what the reference kernels compute.
    """
    is_here = available_runtimes()[settings.runtime][0].isdigit()
    runtime = settings.runtime if is_here else "litert-reference"
    asked = [replace(job, is_timed=False) for job in jobs]
    measured = Host().run(asked, replace(settings, runtime=runtime, runs=0, cpus=None)).measurements
    return [row.outputs for row in measured]


def compare_outputs(
    expected: Sequence[np.ndarray], received: Sequence[np.ndarray], bound_lsb: float | None = 0
) -> Agreement:
    """Raw outputs [n, ...] of one file from two machines, in LSBs; float outputs in their own units."""
    pairs = list(zip(expected, received, strict=True))
    differences = [np.abs(a.astype(np.float64) - b.astype(np.float64)) for a, b in pairs]
    same = np.concatenate([(difference == 0).ravel() for difference in differences])
    agreement = [np.mean(_top1(a) == _top1(b)) for a, b in pairs]
    largest = max(float(difference.max()) for difference in differences)
    return Agreement(len(expected[0]), float(same.mean()), largest, float(min(agreement)), bound_lsb)


def bound_lsb(model: flatbuffer.Model, settings: Settings) -> float | None:
    """How far a file's outputs may be apart on two machines: 0 with LiteRT's kernels, by default or reference.

    1 behind SOFTMAX, whose table of exponentials has 16 bits on ARM and is float elsewhere.  None, as far as it may be,
    for convolutions from int4, which the built-in kernel unpacks and rounds twice on x86, once on ARM; for functions on
    int16, whose tables show the last bits of libm; for LiteRT without its delegate, and tflite-runtime.  Float kernels
    add up in orders of their own, other processors round as they like.
    """
    kinds: dict[str, set[str]] = {}
    for operator in model.operators:
        kinds.setdefault(operator.name, set()).update(model.tensors[index].dtype for index in operator.outputs)
    makes_float = any("float32" in types for kind, types in kinds.items() if kind not in ("QUANTIZE", "DEQUANTIZE"))
    unpacks = any(op.name == "CONV_2D" and model.tensors[op.inputs[1]].dtype == "int4" for op in model.operators)
    looks_up = any("int16" in kinds.get(kind, ()) for kind in ("GELU", "EXP", "LOG"))
    is_same = settings.delegate == "xnnpack" and settings.runtime in ("litert", "litert-reference")
    if not is_same or makes_float or unpacks or looks_up:
        return None
    if "SOFTMAX" not in kinds or settings.runtime == "litert-reference":
        return 0
    return 1 if all(not _is_read(model, index) for index in _softmaxes(model, "outputs")) else None


def before_softmax(model: flatbuffer.Model) -> list[int]:
    """Tensors inside that a SOFTMAX at the end of the graph reads: up to there values are the same on every machine."""
    if any(_is_read(model, index) for index in _softmaxes(model, "outputs")):
        return []
    computed = {index for operator in model.operators for index in operator.outputs} - set(model.outputs)
    return [index for index in dict.fromkeys(_softmaxes(model, "inputs")) if index in computed]


def _softmaxes(model: flatbuffer.Model, side: str) -> list[int]:
    return [getattr(operator, side)[0] for operator in model.operators if operator.name == "SOFTMAX"]


def _is_read(model: flatbuffer.Model, tensor: int) -> bool:
    """Whether an operator computes with a tensor, rather than hand it out in another type."""
    return any(tensor in op.inputs for op in model.operators if op.name not in ("QUANTIZE", "DEQUANTIZE"))


def disagreements(records: Mapping[str, Record]) -> list[str]:
    """`problems` of every file that was compared with this machine."""
    compared = [(name, row.target, row.agreement) for name, row in records.items() if row.agreement]
    return [sentence for name, target, found in compared for sentence in problems(name, {target: found})]


def problems(name: str, agreements: Mapping[str, Agreement]) -> list[str]:
    """A sentence for each target whose outputs are beyond their bound, or agree on less than 98 % of the top-1."""
    sentences = []
    for target, found in agreements.items():
        if found.bound_lsb is not None and found.max_lsb > found.bound_lsb:
            sentences.append(
                f"{name} on {target}: {found.identical:.4%} of the output values are those of this machine; largest "
                f"difference {found.max_lsb:g} LSB, allowed {found.bound_lsb:g}."
            )
        elif found.top1_agreement < MIN_TOP1_AGREEMENT:
            sentences.append(
                f"{name} on {target}: top-1 agrees with this machine on {found.top1_agreement:.2%} of {found.samples} "
                f"samples, expected at least {MIN_TOP1_AGREEMENT:.0%}."
            )
    return sentences


def require_delegated(records: Mapping[str, Record], share: float) -> None:
    """Checks that a delegate took at least a share of every file's operators.

    Raises:
        DelegationError: it took fewer, or the target does not say.
    """
    for name, record in records.items():
        delegate = record.delegate
        if delegate is None:
            raise DelegationError(f"{record.target} does not say how many operators of {name} a delegate took.")
        if delegate.share < share:
            raise DelegationError(
                f"{name}: {delegate.name} took {delegate.operators} of {delegate.of} operators ({delegate.share:.0%}), "
                f"expected at least {share:.0%}."
            )


def _top1(values: np.ndarray) -> np.ndarray:
    return np.argmax(values.reshape(len(values), -1), axis=-1)


def _with_profiles(outcome: Outcome, target: Target, jobs: Sequence[Job], settings: Settings) -> Outcome:
    """Adds what each operator costs as a model of its own: without what the runtime fuses across operators."""
    parts = {job.name: flatbuffer.single_operators(job.model.content) for job in jobs}
    models = {name: [flatbuffer.read(content) for _, content in rows] for name, rows in parts.items()}
    # All files in one go, in turns: a machine that gets slower meanwhile is so for all of them.
    single = [
        Job("operator", model, tuple(random_vectors(model, 1)), wants_outputs=False)
        for rows in models.values()
        for model in rows
    ]
    with task(f"operators on {target.name}"):
        answers = iter(target.run(single, settings).measurements if single else ())
    profiled = []
    for job, measured in zip(jobs, outcome.measurements, strict=True):
        profile = tuple(
            OperatorCost(
                job.model.tensors[operator.outputs[0]].name, operator.name, float(np.median(next(answers).costs))
            )
            for operator, _ in parts[job.name]
        )
        profiled.append(replace(measured, profile=profile))
    return replace(outcome, measurements=tuple(profiled))


def _record(
    target: Target,
    settings: Settings,
    outcome: Outcome,
    job: Job,
    measured: Measurement,
    expected: Sequence[np.ndarray],
) -> Record:
    return Record(
        target=target.name,
        runtime=outcome.runtime,
        runtime_version=outcome.runtime_version,
        unit=outcome.unit,
        threads=settings.threads,
        warmup=settings.warmup,
        runs=len(measured.costs),
        cost=summarize(measured.costs),
        init_ms=measured.init_ms,
        peak_memory_bytes=measured.peak_memory_bytes,
        size_bytes=job.model.size_bytes,
        operator_counts=dict(Counter(operator.name for operator in job.model.operators)),
        delegate=measured.delegate,
        profile=measured.profile,
        agreement=compare_outputs(expected, measured.outputs, bound_lsb(job.model, settings)) if expected else None,
        device=outcome.device,
        details=measured.details,
        warnings=outcome.warnings,
    )


def _ratio_spread(values: Sequence[float], first: Sequence[float]) -> RatioSpread:
    if len(values) != len(first):  # not in rounds: the medians are all there is
        only = float(np.median(values) / np.median(first))
        return RatioSpread(only, only, only)
    ratios = summarize([value / reference for value, reference in zip(values, first, strict=True)])
    return RatioSpread(ratios.min, ratios.median, ratios.max)
