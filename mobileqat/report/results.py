"""Reading `results`, the content of report.json.

Any part may be missing: a failed or shortened run has less.  What is missing, null or not finite reads as
None here, so that the other modules have one case to handle.
"""

import math
from collections.abc import Mapping
from typing import Any

# Labels of the variants, in the order in which they are shown.
VARIANTS = {"float": "float", "ptq": "PTQ", "qat": "QAT"}

Place = tuple[str, str, int]  # target, runtime, threads


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


def wilson_interval(share: float, samples: float, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share of `samples` (Wilson 1927); it stays within 0 and 1."""
    spread = z * math.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    centre, scale = share + z**2 / (2 * samples), 1 + z**2 / samples
    return (centre - spread) / scale, (centre + spread) / scale


def cost_records(variant: Mapping[str, Any] | None) -> dict[Place, dict[str, Any]]:
    """What was measured, by place, in the order of measurement."""
    records = lookup(variant, "bench") or []
    return {(record["target"], record["runtime"], record["threads"]): record for record in records}


def cost_places(variants: Mapping[str, Any], unit: str | None = None) -> dict[Place, str]:
    """Where anything was measured, with the unit of the cost there; only places of one unit if it is given."""
    records = {place: row for variant in variants.values() for place, row in cost_records(variant).items()}
    return {place: row["unit"] for place, row in records.items() if unit in (None, row["unit"])}


def cost(variant: Mapping[str, Any] | None, place: Place, statistic: str = "median") -> float | None:
    """What one inference costs, in the record's unit."""
    return number(cost_records(variant).get(place), "cost", statistic)


def cost_ratio(variant: Mapping[str, Any] | None, reference: Mapping[str, Any] | None, place: Place) -> float | None:
    """Cost over that of `reference`, the float file; as measured in turns when it was."""
    measured = number(cost_records(variant).get(place), "ratio_to_float", "median")
    return measured or ratio(cost(variant, place), cost(reference, place))


def failed_steps(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Steps that failed: the one that ended the run, or checks after which it went on."""
    return [step for step in results.get("steps") or [] if step.get("status") == "failed"]


def last_failed_step(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The step that ended the run, or None."""
    failed = failed_steps(results)
    return failed[-1] if failed and failed[-1] is results["steps"][-1] else None
