"""How long the runs of `benchmark_model` took, read from its lines and checked against what it prints twice.

    Initialized session in 1.01ms.                        = Init
    count=34 first=22886 curr=14018 min=.. avg=15080.3    = First inference, Warmup (avg)
    count=62 first=14453 curr=21887 min=.. avg=16236.5    = Inference (avg)
    Inference timings in us: Init: 1010, First inference: 22886, Warmup (avg): 15080.3, Inference (avg): 16236.5

Printed once only are the minimum, maximum, standard deviation and percentiles, which must fit the mean and the count,
and the count, which must fit what the program announced; builds of 2018 and 2019 do not repeat the first inference.
LiteRT's block of results, in hundredths of a millisecond, must say the same as the lines before it; on its own it
stands without a second print.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mobileqat.errors import DeviceError


@dataclass(frozen=True)
class Latency:
    """Milliseconds per inference; older builds print no percentiles."""

    mean: float
    min: float
    max: float
    std: float
    median: float | None = None
    p5: float | None = None
    p95: float | None = None


@dataclass(frozen=True)
class Timings:
    """The fields of `benchmark_model.Parsed` with these names."""

    init_ms: float
    first_ms: float
    warmup: int
    runs: int
    latency_ms: Latency


NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]\d\d)?)"
_STATISTICS = re.compile(
    rf"count=(\d+)(?: first=(\d+))?(?: curr=(\d+))?( ?\(all same\))?"
    rf"(?: min=(\d+) max=(\d+) avg={NUMBER} std={NUMBER})?(?: p5={NUMBER} median={NUMBER} p95={NUMBER})?"
)
_ANNOUNCED = re.compile(
    rf"Running benchmark for (?:at least )?(\d+) iterations(?: and at least (-?{NUMBER}) seconds\b.*)?"
)
_SESSION = re.compile(rf"Initialized session in {NUMBER}ms\.?")
_TIMINGS = re.compile(
    rf"Inference timings in us: Init: {NUMBER}, First inference: {NUMBER}, "
    rf"Warmup \(avg\): {NUMBER}, Inference \(avg\): {NUMBER}"
)
_OLD_TIMINGS = re.compile(
    rf"Average inference timings in us: Warmup: {NUMBER}, Init: {NUMBER}, (?:no stats|Inference): {NUMBER}"
)
_RESULT = re.compile(
    rf"(Model initialization|Warmup \(first\)|Warmup \(avg\)|Inference \(\w+\)): +{NUMBER}(?: ms)?(?: \((\d+) runs\))?"
)


@dataclass(frozen=True)
class _Statistics:
    """A `count=` line, microseconds."""

    count: int
    first: float
    latency: Latency


def timings(texts: Sequence[str]) -> Timings:
    """Reads them from the program's lines, which have no prefixes any more.

    Raises:
        DeviceError: lines are missing, there is more than one run, or two lines contradict each other.
    """
    results = _results(texts)
    counted = [text for text in texts if text.startswith("count=")]
    if results and not counted:
        return results
    if len(counted) != 2:
        fault = "is cut off" if len(counted) < 2 else "holds more than one run"
        raise DeviceError(f"The output of benchmark_model {fault}; {_ending(texts)}")
    warmup, timed = map(_statistics, counted)
    _check_announced(texts, (warmup, timed))
    if not timed.count:
        raise DeviceError("benchmark_model ran no inference, so it measured nothing.")
    init_us = _session_us(texts)
    first_us = warmup.first if warmup.count else timed.first
    found = Timings(_ms(init_us), _ms(first_us), warmup.count, timed.count, _in_ms(timed.latency))
    if results:
        _check_results(results, found)
    else:
        _check_repetition(texts, init_us, warmup, timed)
    return found


def _ending(texts: Sequence[str]) -> str:
    return f"its last line is: {next((text for text in reversed(texts) if text), 'nothing')[:200]}"


# --- the lines of statistics


def _statistics(text: str) -> _Statistics:
    match = _STATISTICS.fullmatch(text)
    if not match:
        raise DeviceError(f"A line of benchmark_model's output is garbled: {text[:200]}")
    count, first, curr, low, high, mean, std, p5, median, p95 = (
        None if value is None else float(value) for value in match.group(1, 2, 3, 5, 6, 7, 8, 9, 10, 11)
    )
    if count == 0:
        return _Statistics(0, 0.0, Latency(0.0, 0.0, 0.0, 0.0))
    if count == 1 or match[4]:  # then one number says everything
        first, low, high, mean, std = curr, curr, curr, curr, 0.0
    if count is None or curr is None or first is None or mean is None or low is None or high is None or std is None:
        raise DeviceError(f"A line of benchmark_model's output is cut off: {text[:200]}")
    latency = Latency(mean, low, high, std, median, p5, p95)
    if not _is_possible(int(count), (first, curr), latency):
        raise DeviceError(f"A line of benchmark_model's output contradicts itself: {text[:200]}")
    return _Statistics(int(count), first, latency)


def _is_possible(count: int, samples: Iterable[float], x: Latency) -> bool:
    """Whether numbers of that order and spread exist; the standard deviation is cut to whole microseconds."""
    percentiles = [value for value in (x.p5, x.median, x.p95) if value is not None]
    if not all(x.min <= value <= x.max for value in (*samples, x.mean, *percentiles)):
        return False
    above, below = x.max - x.mean, x.mean - x.min
    rounding = 1 + 1e-5 * x.max
    # The extremes alone make the smallest variance; Bhatia and Davis: the largest of a population is above * below.
    smallest = (above**2 + below**2) / count if count > 1 else 0.0
    largest = (above + rounding) * (below + rounding) * count / max(count - 1, 1)
    return percentiles == sorted(percentiles) and smallest <= (x.std + rounding) ** 2 and x.std**2 <= largest


def _check_announced(texts: Sequence[str], stages: Sequence[_Statistics]) -> None:
    """The counts must be what was announced: that many, or at least that many where a duration was asked for too."""
    announced = [match for match in map(_ANNOUNCED.fullmatch, texts) if match]
    if len(announced) != len(stages):
        raise DeviceError("The output of benchmark_model is incomplete: it does not announce its runs.")
    for match, stage in zip(announced, stages, strict=True):
        wanted, is_exact = int(match[1]), match[2] is None or float(match[2]) <= 0
        if stage.count < wanted or (is_exact and stage.count > wanted):
            raise DeviceError(f"benchmark_model announced {wanted} runs and made {stage.count}.")


def _session_us(texts: Sequence[str]) -> float:
    found = {match[1] for match in map(_SESSION.fullmatch, texts) if match}
    if len(found) != 1:
        raise DeviceError("The output of benchmark_model does not say, once, how long the initialization took.")
    return float(found.pop()) * 1e3


# --- what is printed twice


def _check_repetition(texts: Sequence[str], init_us: float, warmup: _Statistics, timed: _Statistics) -> None:
    """The line at the end repeats what the lines before it say; some builds print it twice."""
    new = {match.groups() for match in map(_TIMINGS.fullmatch, texts) if match}
    old = {match.groups() for match in map(_OLD_TIMINGS.fullmatch, texts) if match}
    if len(new) + len(old) != 1:
        raise DeviceError(f"The output of benchmark_model has no single line of timings; {_ending(texts)}")
    if new:
        repeated, said = new.pop(), [init_us, warmup.first, warmup.latency.mean, timed.latency.mean]
    else:
        repeated, said = old.pop(), [warmup.latency.mean, init_us, timed.latency.mean]
    # Six digits are what both prints have at least.
    if [f"{float(value):g}" for value in repeated] != [f"{value:g}" for value in said]:
        raise DeviceError("The timings that benchmark_model printed at its end are not those it printed before.")


def _results(texts: Sequence[str]) -> Timings | None:
    """LiteRT's block of results, None without one."""
    begins = [index for index, text in enumerate(texts) if "BENCHMARK RESULTS" in text]
    if not begins:
        return None
    end = next((index for index in range(begins[0] + 1, len(texts)) if re.fullmatch("={30,}", texts[index])), None)
    if len(begins) > 1 or end is None:
        raise DeviceError(f"The results of benchmark_model are cut off, or two runs'; {_ending(texts)}")
    rows = [match for match in map(_RESULT.fullmatch, texts[begins[0] : end]) if match]
    values, counts = {row[1]: float(row[2]) for row in rows}, {row[1]: int(row[3]) for row in rows if row[3]}
    try:
        latency = Latency(*(values[f"Inference ({name})"] for name in ("avg", "min", "max", "std")))
        runs = counts["Warmup (avg)"], counts["Inference (avg)"]
        found = Timings(values["Model initialization"], values["Warmup (first)"], *runs, latency)
    except KeyError as error:
        raise DeviceError(f"The results of benchmark_model have no line {error}.") from None
    if len(rows) != len(values) or not latency.min <= latency.mean <= latency.max or not found.runs:
        raise DeviceError("The results of benchmark_model contradict themselves.")
    return found


def _check_results(results: Timings, counted: Timings) -> None:
    pairs = [(results.init_ms, counted.init_ms)]
    pairs += [(results.first_ms, counted.first_ms)] if counted.warmup else []
    names = ("mean", "min", "max", "std")
    pairs += [(getattr(results.latency_ms, name), getattr(counted.latency_ms, name)) for name in names]
    # Hundredths of a millisecond; the standard deviation was cut to microseconds, the mean to six digits.
    is_close = all(abs(first - second) <= 0.0061 + 1e-5 * second for first, second in pairs)
    if not is_close or (results.warmup, results.runs) != (counted.warmup, counted.runs):
        raise DeviceError("The results that benchmark_model printed at its end are not those it printed before.")


def _ms(us: float) -> float:
    return round(us / 1e3, 9)


def _in_ms(x: Latency) -> Latency:
    percentiles = (None if value is None else _ms(value) for value in (x.median, x.p5, x.p95))
    return Latency(_ms(x.mean), _ms(x.min), _ms(x.max), _ms(x.std), *percentiles)
