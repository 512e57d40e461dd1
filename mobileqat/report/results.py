"""Reading `results`, the content of report.json.

Any part may be missing: a failed or shortened run has less.  What is missing, null or not finite reads as
None here, so that the other modules have one case to handle.
"""

import math
from collections.abc import Mapping
from typing import Any

# Labels of the variants, in the order in which they are shown.
VARIANTS = {"float": "float", "ptq": "PTQ", "qat": "QAT"}

LatencyKey = tuple[str, int]  # runtime, threads


def lookup(results: Any, *path: str) -> Any:
    """The value at a path of keys, or None."""
    for key in path:
        if not isinstance(results, Mapping):
            return None
        results = results.get(key)
    return results


def number(results: Any, *path: str) -> float | None:
    """The finite number at a path of keys, or None."""
    value = lookup(results, *path)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def present_variants(variants: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The variants that the run produced, in the order in which they are shown."""
    return {name: variants[name] for name in VARIANTS if variants and variants.get(name)}


def file_name(name: str, variant: Mapping[str, Any]) -> str:
    return variant.get("file") or f"{name}.tflite"


def accuracy(variant: Mapping[str, Any] | None) -> float | None:
    """Share of right answers in the interpreter."""
    return number(variant, "accuracy", "interpreter")


def difference_points(value: float | None, reference: float | None) -> float | None:
    """`value - reference`, two shares, in percentage points."""
    if value is None or reference is None:
        return None
    return round(100 * (value - reference), 6)  # without the noise of binary fractions at a margin


def ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def standard_error_points(share: float | None, samples: float | None) -> float | None:
    """Binomial standard error of a share of `samples`, in percentage points."""
    if share is None or not samples:
        return None
    return 100 * math.sqrt(share * (1 - share) / samples)


def latency_records(variant: Mapping[str, Any] | None) -> dict[LatencyKey, dict[str, Any]]:
    """The measured latencies by runtime and number of threads, in the order of measurement."""
    records = lookup(variant, "latency") or []
    return {(record["runtime"], record["threads"]): record for record in records}


def latency_ms(variant: Mapping[str, Any] | None, key: LatencyKey, statistic: str = "median") -> float | None:
    return number(latency_records(variant).get(key), "latency_ms", statistic)


def failed_step(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The step that ended the run, or None."""
    return next((step for step in results.get("steps") or [] if step.get("status") == "failed"), None)
