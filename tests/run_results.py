"""Content of report.json for tests of what shows it: a complete run, a failed one, and their parts."""

from typing import Any

from mobileqat.report import decide

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CPU = {"cpu": "AMD EPYC 7B13", "cores": 2, "platform": "Linux-6.1-x86_64"}


def make_variant(
    name: str, accuracy: float | None, *, integer: bool = True, samples: int = 10_000, **other: Any
) -> dict[str, Any]:
    """A variant whose file passed every check."""
    return {
        "file": f"{name}.tflite",
        "size_bytes": 98_496 if integer else 318_144,
        "accuracy": {"samples": samples, "interpreter": accuracy, "simulation": accuracy},
        "inspection": make_inspection(integer),
        "parity": make_parity() if integer else None,
        "bench": [make_latency(0.284 if integer else 0.812) | {"profile": make_profile(integer)}],
        "layers": make_layers() if integer else None,
        **other,
    }


def make_profile(integer: bool = True) -> list[dict[str, Any]]:
    names = (
        ["conv1_relu", "add1", "softmax"] if integer else ["net/conv1/Relu;net/conv1/Conv2D", "net/add1", "Identity"]
    )
    costs = (0.2, 0.05, 0.01) if integer else (0.6, 0.03, 0.01)
    kinds = ("CONV_2D", "ADD", "SOFTMAX")
    return [
        {"name": name, "kind": kind, "cost": cost, "calls": 1}
        for name, kind, cost in zip(names, kinds, costs, strict=True)
    ]


def make_layers() -> list[dict[str, Any]]:
    """Noise of three operators; the last one has no weights."""
    weights = {"bits": 8, "qmin": -127, "qmax": 127, "low": -127.5, "step": 4, "counts": [5, *[9] * 62, 30]}
    outputs = {
        "qmin": -128,
        "qmax": 127,
        "clipped": 0.002,
        "low": -128.0,
        "step": 4.1,
        "counts": [900, *range(62, -1, -1)],
    }
    rows = [
        ("conv1", "CONV_2D", "conv1_relu", 41.2),
        ("add1", "ADD", "add1", 44.0),
        ("softmax", "SOFTMAX", "softmax", 50.1),
    ]
    return [
        {
            "operator": operator,
            "kind": kind,
            "tensor": tensor,
            "sqnr_db": decibels - 2,
            "own_sqnr_db": decibels,
            "weights": weights if kind == "CONV_2D" else None,
            "activations": outputs,
        }
        for operator, kind, tensor, decibels in rows
    ]


def make_graph() -> dict[str, Any]:
    """input -> conv1 -> add1 (with the input again) -> softmax."""
    grid = {"shape": [1, 32, 32, 16], "dtype": "int8", "scale": 0.0235, "zero_point": -128}
    names = {"0": "image", "3": "conv1_relu", "4": "add1", "5": "softmax"}
    return {
        "variant": "qat",
        "inputs": [0],
        "outputs": [5],
        "operators": [
            {"kind": "CONV_2D", "inputs": [0], "outputs": [3], "constants": ["int8 [16, 3, 3, 3]", "int32 [16]"]},
            {"kind": "ADD", "inputs": [3, 0], "outputs": [4], "constants": []},
            {"kind": "SOFTMAX", "inputs": [4], "outputs": [5], "constants": []},
        ],
        "tensors": {index: {"name": name, **grid} for index, name in names.items()},
    }


def make_ranges() -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "ranges": {"conv1_relu": [0.0, 6 - epoch / 4], "add1": [-1.0, 3.0]}} for epoch in range(11)
    ]


def make_inspection(integer: bool = True, problems: tuple[str, ...] = ()) -> dict[str, Any]:
    dtype, size_bytes = ("int8", 98_496) if integer else ("float32", 318_144)
    tensor = {
        "name": "serving_default_image:0",
        "shape": [1, 32, 32, 3],
        "dtype": dtype,
        "scale": 0.0039215689 if integer else None,
        "zero_point": -128 if integer else None,
    }
    return {
        "fully_integer": integer,
        "islands": [],
        "stray_conversions": [],
        "requantizations": [],
        "shape_arithmetic": [],
        "operator_counts": {"CONV_2D": 9, "ADD": 3, "MEAN": 1, "FULLY_CONNECTED": 1, "SOFTMAX": 1},
        "dtype_counts": {"int8": 28, "int32": 11} if integer else {"float32": 36, "int32": 1},
        "weight_bytes": size_bytes - 15_000,
        "size_bytes": size_bytes,
        "inputs": [tensor],
        "outputs": [tensor | {"name": "StatefulPartitionedCall:0", "shape": [1, 10]}],
        "problems": list(problems),
    }


def make_operator(name: str, kind: str = "CONV_2D", identical: float = 1.0, max_lsb: int = 0) -> dict[str, Any]:
    bar = 0.9999 if kind in ("CONV_2D", "FULLY_CONNECTED") else 0.99
    return {
        "operator": name,
        "kind": kind,
        "outputs": 1_048_576,
        "identical": identical,
        "max_lsb": max_lsb,
        "min_identical": bar,
        "bound_lsb": 1,
        "passed": identical >= bar and max_lsb <= 1,
    }


def make_parity(operators: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    operators = operators or [
        *(make_operator(f"conv{index}", identical=1 - index * 1e-6, max_lsb=1) for index in range(1, 10)),
        *(make_operator(f"add{index}", "ADD") for index in range(1, 4)),
        make_operator("average_pool", "MEAN", 0.9994, 1),
        make_operator("logits", "FULLY_CONNECTED"),
        make_operator("softmax", "SOFTMAX"),
    ]
    passed = all(row["passed"] for row in operators)
    return {
        "passed": passed,
        "runtime": "litert 2.3.0",
        "weights": {"compared": 77_360, "identical": 77_360},
        "end_to_end": {"samples": 10_000, "identical": 0.99812, "max_lsb": 1, "top1_agreement": 0.9999},
        "operators": operators,
        "problems": [] if passed else ["1 operator misses its bound."],
    }


def make_latency(median: float, threads: int = 1) -> dict[str, Any]:
    return {
        "target": "host",
        "runtime": "litert",
        "runtime_version": "2.3.0",
        "unit": "ms",
        "threads": threads,
        "warmup": 20,
        "runs": 200,
        "cost": {
            "median": median,
            "p90": 1.1 * median,
            "min": 0.95 * median,
            "max": 1.6 * median,
            "mean": 1.02 * median,
            "std": 0.05 * median,
        },
        "init_ms": 3.1,
        "peak_memory_bytes": 12_300_000,
        "delegate": None,
        "agreement": None,
        "device": CPU,
    }


def make_history(initial: float, values: list[float]) -> dict[str, Any]:
    epochs = [
        {
            "epoch": epoch,
            "loss": 0.42 - 0.01 * epoch,
            "accuracy": value + 0.01,
            "val_loss": 0.45,
            "val_accuracy": value,
            "learning_rate": 1e-4 / epoch,
            "seconds": 41.3,
        }
        for epoch, value in enumerate(values, 1)
    ]
    best = max(range(len(values)), key=values.__getitem__) + 1 if values else None
    return {"epochs": epochs, "best_epoch": best, "initial_val_accuracy": initial}


def make_results() -> dict[str, Any]:
    """A complete run: QAT gains 0.42 points over PTQ."""

    def per_class(offset: float) -> list[dict[str, Any]]:
        return [
            {"class": label, "accuracy": 0.8 + 0.015 * index + offset * (index % 4 - 1), "samples": 1000}
            for index, label in enumerate(CLASSES)
        ]

    variants = {
        "float": make_variant("float", 0.8719, integer=False, per_class=per_class(0), agreement_with_float=1.0),
        "ptq": make_variant("ptq", 0.8688, per_class=per_class(-0.006), agreement_with_float=0.9812),
        "qat": make_variant("qat", 0.873, per_class=per_class(0.004), agreement_with_float=0.9745),
    }
    names = ["data", "float", "ptq", "qat", "convert", "inspect", "parity", "layers", "evaluate", "bench"]
    return {
        "schema_version": 1,
        "mobileqat": "0.1.0",
        "name": "cifar10_resnet8_w8a8",
        "description": "MLPerf Tiny ResNet8 on CIFAR-10, from its reference weights to int8",
        "created": "2026-11-20T16:00:00+00:00",
        "seconds": 812.0,
        "verdict": decide(variants, 0.1),
        "recipe": {"name": "cifar10_resnet8_w8a8", "seed": 0, "qat": {"epochs": 10, "learning_rate": 0.0001}},
        "data": {
            "source": "cifar10",
            "class_names": CLASSES,
            "train": 45_000,
            "validation": 5_000,
            "test": 10_000,
            "calibration": 512,
        },
        "model": {"name": "resnet8", "parameters": 78_666},
        "variants": variants,
        "training": {
            "float": make_history(0.8752, []),
            "qat": make_history(0.8706, [0.868, 0.8702, 0.8738, 0.8731, 0.8752, 0.8766, 0.8771, 0.8768, 0.877, 0.8769])
            | {"ranges": make_ranges()},
        },
        "graph": make_graph(),
        "islands": {"operators": [], "borders": []},
        "plan": [
            {
                "tensor": f"stack{index}/add",
                "shape": [32, 32, 16],
                "operator": "ADD",
                "layers": [f"stack{index}/add", f"stack{index}/relu"],
                "bits": 8,
                "parameters": "a range of its own",
                "shared_with": None,
                "scale": 0.02351234,
                "zero_point": -128,
                "minimum": 0.0,
                "maximum": 5.9956,
            }
            for index in range(1, 20)
        ],
        "steps": [{"name": name, "status": "done", "seconds": 41.5, "message": ""} for name in names],
        "environment": {"python": "3.11.7", "tensorflow": "2.21.0", "numpy": "2.2.0", "machine": CPU},
    }


def make_failed_results() -> dict[str, Any]:
    """The same run, ended by parity: no evaluation, no latency, no verdict."""
    results = make_results()
    del results["verdict"]
    results["steps"] = results["steps"][:7]
    results["steps"][6] |= {"status": "failed", "message": "ptq.tflite: conv1 misses its bound."}
    for variant in results["variants"].values():
        for part in ("accuracy", "per_class", "agreement_with_float", "bench", "parity", "layers"):
            del variant[part]
    del results["graph"]
    return results


def make_islands() -> dict[str, Any]:
    """add1 in float."""
    return {
        "operators": [
            {"operator": "add1", "kind": "ADD", "output": "add1", "pattern": "add*"},
            {"operator": "more", "kind": "MUL", "output": "more", "pattern": None},
        ],
        "borders": [
            {
                "tensor": "conv1_relu",
                "conversion": "DEQUANTIZE",
                "made_by": "conv1",
                "read_by": ["add1"],
                "values": 4096,
            },
            {"tensor": "add1", "conversion": "QUANTIZE", "made_by": "add1", "read_by": [], "values": 4096},
        ],
    }
