"""The files that show one run: the page, the model card, and node data for Model Explorer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobileqat.report.model_card import render_card
from mobileqat.report.node_data import node_data
from mobileqat.report.page import write_html, write_text
from mobileqat.report.results import lookup

NODE_DATA = "model_explorer"


def write_report(results: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes report.html, and of a run with a verdict model_card.md and model_explorer/*.json; returns the page."""
    folder = Path(folder)
    page = write_html(results, folder / "report.html")
    if lookup(results, "verdict", "ship"):
        write_text(folder / "model_card.md", render_card(results).rstrip() + "\n")
        files = node_data(results)
        if files:
            (folder / NODE_DATA).mkdir(exist_ok=True)
        for name, content in files.items():
            write_text(folder / NODE_DATA / name, json.dumps(content, indent=1, allow_nan=False))
    return page
