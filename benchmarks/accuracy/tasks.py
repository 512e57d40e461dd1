"""What is measured: tasks, the cells of each, and the recipe of a cell.

A cell is one child process and one line of results: `TASK/WHAT/SEED`, where WHAT is

    float                       the float model that all other cells of the task start from
    w8a8, w4a8, ...             ours: PTQ and QAT of one scheme
    converter, converter-w8a16  TFLiteConverter's full-integer PTQ of the same weights and calibration samples
    tfmot                       TFMOT's QAT of the same weights
    mlperf                      the integer file that MLPerf Tiny ships for the task
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobileqat.recipe import Recipe, load_recipe

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A float model, data, and what is made of them.

    Attributes:
        title: for the table.
        recipe: a shipped recipe by name.
        edges: patterns of the first and the last layer, which stay at 8 bits in the mixed scheme.
        overrides: for every cell of the task, beside those of the scheme.
        w4: further overrides for 4-bit weights: their training takes longer.
        seeds: how many of them a scheme or peer gets here, where the usual number does not tell what is better.
        tfmot_batch: batch size of TFMOT, small enough that its moving averages arrive in a few epochs.
        trains: whether there is data to train on.
        keras2: SavedModel below MOBILEQAT_DATA to import as the float model.
        shipped: integer file below MOBILEQAT_DATA that others ship.
    """

    title: str
    recipe: str
    edges: tuple[str, str]
    overrides: Overrides = field(default_factory=dict)
    w4: Overrides = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    tfmot_batch: int = 32
    trains: bool = True
    keras2: str | None = None
    shipped: str | None = None


TASKS = {
    "resnet8": Task(
        "ResNet8 (MLPerf Tiny's weights), CIFAR-10",
        "cifar10_resnet8_w8a8",
        ("conv2d", "dense"),
        w4={"qat.learning_rate": 3e-4, "qat.epochs": 4, "qat.batch_size": 128},
    ),
    "mobilenetv1": Task(
        "MobileNetV1-0.25, Fashion-MNIST",
        "fashion_mnist_mobilenetv1_w8a8",
        ("conv", "classes"),
        w4={"qat.learning_rate": 1e-4, "qat.epochs": 2},
        seeds={"w8a16": 3},
    ),
    "mobilenetv3": Task(
        "MobileNetV3-Small-0.5, CIFAR-10",
        "cifar10_mobilenetv3_w8a8",
        ("conv", "classes"),
        w4={"qat.epochs": 8},
    ),
    "fsdd": Task(
        "DS-CNN, spoken digits (FSDD, official split)",
        "fsdd_dscnn_w8a8",
        ("conv", "classes"),
        seeds={"w8a8": 8, "converter": 8, "tfmot": 8},  # one clip of 300 is 0.33 points
    ),
    "fsdd-speakers": Task(
        "DS-CNN, spoken digits of two voices that training never hears (FSDD)",
        "fsdd_dscnn_w8a8",
        ("conv", "classes"),
        {"data.options.split": "speakers"},
        seeds={"w4a8-edges8": 8},
    ),
    "trashnet": Task(
        "MobileNetV2-0.35, TrashNet 96x128 (authors' split)",
        "trashnet_mobilenetv2_w8a8",
        ("conv", "classes"),
        seeds={"w8a8": 5, "converter": 5, "tfmot": 5},
        tfmot_batch=16,
    ),
    "kws": Task(
        "DS-CNN (MLPerf Tiny's weights), keyword samples kws01: a fifth calibrates, the rest is scored",
        "kws01_dscnn_w8a8",
        ("conv2d", "dense"),
        trains=False,
        keras2="mlperf-tiny/models/kws01/kws_ref_model",
        shipped="mlperf-tiny/models/kws01/kws_ref_model.tflite",
    ),
}

# Ours: the overrides of each scheme, and whether it is run with every seed or with the first alone.
SCHEMES: dict[str, tuple[Overrides, bool]] = {
    "w8a8": ({}, True),
    "w4a8": ({"quantize.scheme": "w4a8"}, True),
    "w8a16": ({"quantize.scheme": "w8a16"}, False),
    "w4a8-edges8": ({"quantize.scheme": "w4a8"}, False),
}
PEERS = {"converter": True, "converter-w8a16": False, "tfmot": True}

# The seed also carves validation from train, so the float model has seen most of what other seeds validate on.
ALWAYS: Overrides = {"qat.keep_best": False, "bench.enabled": False}
QUICK: Overrides = {
    "float.epochs": 1,
    "float.warmup_epochs": 0,
    "qat.epochs": 1,
    "data.calibration_samples": 32,
}
QUICK_SAMPLES = 200  # of each split
FLOAT_SECTIONS = ("seed", "data", "model", "float", "evaluate")  # what a float model depends on
# After so many steps, 78 % of a TFMOT range's way from +-6 is done (decay 0.999).
TFMOT_STEPS = 1500


@dataclass(frozen=True)
class Cell:
    """One measurement. `variant` holds further overrides, of an ablation."""

    task: str
    what: str
    seed: int
    variant: Overrides = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.task}/{self.what}/{self.seed}"

    @property
    def key(self) -> str:
        return f"{self.what}/{self.seed}"

    @property
    def scheme(self) -> str | None:
        """The scheme of one of ours, also in an ablation: "w4a8+damping" -> "w4a8"."""
        scheme = self.what.partition("+")[0]
        return scheme if scheme in SCHEMES else None


def cells(seeds: int) -> Iterator[Cell]:
    """All cells in the order in which they run: a task's float model first."""
    for name, task in TASKS.items():
        yield Cell(name, "float", 0)
        rows = {scheme: every for scheme, (_, every) in SCHEMES.items()} | PEERS
        if not task.trains:
            # No training, and so few samples that all of them calibrate: nothing depends on the seed.
            rows = {what: False for what in rows if what != "tfmot"}
        for what, every_seed in rows.items():
            for seed in range(task.seeds.get(what, seeds if every_seed else 1)):
                yield Cell(name, what, seed)
        if task.shipped:
            yield Cell(name, "mlperf", 0)


def recipe_of(cell: Cell, quick: bool, weights: Path | None = None) -> Recipe:
    """The native recipe that a cell runs, or whose data and settings it takes.

    Args:
        cell: a float cell gets the float training; others start from `weights`.
        quick: a few samples and single epochs.
        weights: the task's float model.

    Raises:
        RecipeError: a scheme that this version does not have.
    """
    task = TASKS[cell.task]
    values: dict[str, Any] = {"seed": cell.seed, **ALWAYS, **task.overrides}
    if cell.scheme:
        values |= SCHEMES[cell.scheme][0]
        if values.get("quantize.scheme") == "w4a8":
            values |= task.w4
        if cell.scheme.endswith("-edges8"):
            values["quantize.layers"] = dict.fromkeys(task.edges, "w8a8")
    values |= cell.variant
    if quick:
        values |= QUICK
    if cell.what == "float" or not task.trains:
        values["qat.enabled"] = False
    if weights is not None:
        values |= {"model.weights": str(weights), "float.epochs": 0, "float.warmup_epochs": 0}
    return load_recipe(task.recipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def source_of(recipe: Recipe, quick: bool, scale: float | None = None) -> Recipe:
    """The recipe with its data taken through `sources:prepare`, where there is something to prepare."""
    count = QUICK_SAMPLES if quick else None
    if count is None and scale is None:
        return recipe
    data = recipe.data
    options = {"of": data.source, "count": count, "scale": scale, "options": data.options}
    return recipe.model_copy(
        update={"data": data.model_copy(update={"source": "sources:prepare", "path": None, "options": options})}
    )


def trains_float(cell: Cell) -> bool:
    """Whether the task's float model is trained here, rather than loaded from a file of others."""
    return recipe_of(Cell(cell.task, "float", 0), False).float.epochs > 0


def fingerprint(cell: Cell, quick: bool, start: str | None = None) -> str:
    """Changes with everything that a cell's result depends on and that this benchmark decides.

    Args:
        cell: to run.
        quick: how.
        start: digest of the float model's weights, of cells that start from it.
    """
    recipe = recipe_of(cell, quick).model_dump(mode="json", exclude_defaults=True)
    # Defaults are left out, so that a new key of the schema makes nothing old; and where files are does not matter.
    recipe["model"]["weights"] = Path(recipe["model"].get("weights") or "").name
    if cell.what == "float":
        recipe = {key: recipe[key] for key in FLOAT_SECTIONS if key in recipe}
    if cell.what.startswith("converter"):
        recipe.pop("qat", None)
    facts: dict[str, Any] = {"what": cell.what, "recipe": recipe}
    if cell.what == "tfmot":
        recipe.get("qat", {}).pop("batch_size", None)
        facts["tfmot"] = [TASKS[cell.task].tfmot_batch, TFMOT_STEPS]
    if cell.what != "float":
        facts["float"] = start
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
