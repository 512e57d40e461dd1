"""What each technique adds to QAT with 4-bit weights, on the two depthwise nets: two epochs of training each.

    MOBILEQAT_DATA=FOLDER python benchmarks/accuracy/ablation.py

Options are those of run.py, whose float models it shares: `--only 'mobilenetv3/w4a8+damping/*'`.  A technique is a line
in `VARIANTS`: recipe keys that differ from the baseline.  Results: results/ablation_TASK.json, results/ablation.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import run
import table
from tasks import Cell, Overrides

TASKS = ("mobilenetv1", "mobilenetv3")
SCHEME = "w4a8"
# Largest weight, observed ranges, straight-through rounding, labels only.  The small integers are stored as int8, since
# the interpreter takes several times as long for convolutions with int4.
BASELINE: Overrides = {
    "quantize.narrow_storage": False,
    "quantize.weight_range": "maxabs",
    "quantize.adaround.steps": 0,
    "quantize.learn_activation_ranges": False,
    "qat.distillation": 0.0,
    "qat.epochs": 2,
}
TOGETHER: Overrides = {
    "quantize.adaround.steps": 300,
    "quantize.weight_range": "learned",
    "qat.distillation": 0.5,
}
VARIANTS: dict[str, Overrides] = {
    "baseline": {},
    "weight_range_mse": {"quantize.weight_range": "mse"},
    "weight_range_learned": {"quantize.weight_range": "learned"},
    "learn_activation_ranges": {"quantize.learn_activation_ranges": True},
    "distillation": {"qat.distillation": 0.5},
    "estimator_soft": {"qat.estimator": "soft"},
    "estimator_identity": {"qat.estimator": "identity"},
    "damping": {"qat.damping": 1e-4},
    "freeze_oscillations": {"qat.freeze_oscillations": 0.02},
    "reestimate_batch_norm": {"qat.reestimate_batch_norm": 50},
    "weight_ema": {"qat.weight_ema": 0.99},
    "start_after": {"qat.start_after": 0.5},
    "equalize": {"quantize.equalize": True},
    "correct_bias": {"quantize.correct_bias": True},
    "adaround": {"quantize.adaround.steps": 300},
    "learned_and_distilled": {"quantize.weight_range": "learned", "qat.distillation": 0.5},
    "adaround_learned_and_distilled": TOGETHER,
    "these_at_a_tenth_of_the_rate": {**TOGETHER, "qat.learning_rate": 1e-4},
}


def cells(seeds: int) -> Iterator[Cell]:
    for task in TASKS:
        yield Cell(task, "float", 0)
        for name, overrides in VARIANTS.items():
            for seed in range(seeds):
                yield Cell(task, f"{SCHEME}+{name}", seed, {**BASELINE, **overrides})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.parse(parser).set_defaults(seeds=1)
    settings = parser.parse_args(arguments)
    return run.run(list(cells(settings.seeds)), settings, "ablation_", table.ablation_table)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
