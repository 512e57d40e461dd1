"""The model card: what was made, from what, and how it was checked, as Markdown beside the files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mobileqat.report.comparison import comparison_rows
from mobileqat.report.page import flat, recipe_text, template
from mobileqat.report.results import VARIANTS, accuracy, file_name, lookup, number, present_variants, wilson_interval

_MOST_CLASSES = 100
_WORST_CLASSES = 5


def render_card(results: Mapping[str, Any]) -> str:
    """The card as text; names from users are never read as Markdown."""
    variants = present_variants(results.get("variants"))
    recipe = recipe_text(results)
    shipped = (results.get("verdict") or {}).get("ship")
    return template("model_card.md.j2", autoescape=False).render(
        results=results,
        variants=variants,
        labels=VARIANTS,
        rows=comparison_rows(variants),
        accuracies=[
            (VARIANTS[name], share, *wilson_interval(share, samples))
            for name, variant in variants.items()
            if (share := accuracy(variant)) is not None and (samples := number(variant, "accuracy", "samples"))
        ],
        samples=max((number(v, "accuracy", "samples") or 0 for v in variants.values()), default=0),
        shipped=shipped,
        worst=_worst(lookup(variants, shipped, "per_class") or []) if shipped else [],
        classes=_classes((results.get("data") or {}).get("class_names") or []),
        environment=list(flat(results.get("environment") or {})),
        recipe=recipe,
        fence=_fence(recipe),
        file_name=file_name,
    )


def _worst(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of more classes than are shown, those with errors."""
    ranked = sorted((row for row in per_class if row["accuracy"] < 1), key=lambda row: row["accuracy"])
    return ranked[:_WORST_CLASSES] if len(per_class) > _WORST_CLASSES else []


def _classes(names: list[str]) -> str:
    shown = ", ".join(map(str, names[:_MOST_CLASSES]))
    return f"{shown} and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else shown


def _fence(text: str) -> str:
    """Longer than any run of backticks in what it encloses."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
