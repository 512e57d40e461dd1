"""The steps of a run, in order, and what each leaves in the run directory.

    data -> float -> ptq -> qat -> convert -> inspect -> parity -> layers -> evaluate -> bench -> report

A step is a function of the run that returns a JSON-able result.  Finished steps are in the journal, so that a run
can be resumed; a check that fails is remembered and raised at the end, after the report that shows it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, get_args

import keras
import numpy as np
import tensorflow as tf

from mobileqat import flatbuffer, models, parity, plot_data, report, snippets
from mobileqat.adaround import DEFAULT_STEPS, Rounding, adaround
from mobileqat.analyze import Analysis, analyze
from mobileqat.bench.host import describe_machine
from mobileqat.bench.measure import (
    before_softmax,
    bound_lsb,
    compare_outputs,
    disagreements,
    host_outputs,
    measure,
    predict,
    random_vectors,
    raw_vectors,
    require_delegated,
)
from mobileqat.bench.record import Agreement, Job, Record, Settings, Target
from mobileqat.bench.targets import parse_target, require_target
from mobileqat.bias_correction import BiasCorrection, correct_bias
from mobileqat.calibrate import calibrate
from mobileqat.convert import check_ranges, convert, convert_float
from mobileqat.data import Dataset, calibration_samples, classes_not_calibrated, in_batches, load_dataset
from mobileqat.data.stream import Samples
from mobileqat.distribute import from_chief, is_multi_worker, lost_workers, make_strategy, worker_index
from mobileqat.equalize import Pair, equalize
from mobileqat.errors import (
    CalibrationError,
    CheckFailed,
    DataError,
    DelegationError,
    InspectionError,
    MobileQatError,
    ModelError,
    ParityError,
    TrainingError,
)
from mobileqat.evaluate import accuracy, per_class, top1
from mobileqat.layerwise import bytes_per_sample
from mobileqat.legacy import tfmot
from mobileqat.legacy.ranges import set_ranges
from mobileqat.metadata import add_metadata, describe
from mobileqat.plan import QuantPlan
from mobileqat.quantize import QuantizedModel, quantize_model
from mobileqat.recipe import AdaRound, PathSource, Quantize, Recipe, Training, dump_recipe, parse_recipe
from mobileqat.rules import GONE
from mobileqat.rundir import RunDirectory, SharedDirectory, write_whole
from mobileqat.runtime import Session
from mobileqat.schedule import reestimate_batch_norm, train_with
from mobileqat.schemes import get_scheme
from mobileqat.search import FLOAT, Budget, options, search, weight_bytes
from mobileqat.train import History, fit

CALIBRATED = "calibrated"  # the PTQ model before its rounding was learned
LAYERWISE_BYTES = 2 << 30  # what values of layers on AdaRound's samples may take in memory
VECTORS = 16  # test samples whose outputs on a target must be this machine's
PROFILED: dict[str, Any] = {"warmup": 3, "runs": 30, "profile": True}  # operator by operator, on this machine
PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "numpy")
TRAINED_TOGETHER = ("float", "qat")  # the steps that take part in `distribute`; the chief does the others


class Display(Protocol):
    """How a run shows its progress; `cli` has one for terminals."""

    def step(self, name: str) -> None: ...
    def say(self, text: str) -> None: ...
    def done(self, name: str, status: str, seconds: float, message: str) -> None: ...
    def training(self, name: str, epochs: int) -> keras.callbacks.Callback: ...


class Run:
    """One run: the recipe, its directory, and what the steps share. Models are loaded from disk when resumed."""

    def __init__(
        self,
        recipe: Recipe,
        directory: SharedDirectory,
        display: Display | None = None,
        strategy: tf.distribute.Strategy | None = None,
    ):
        self.recipe = recipe
        self.directory: Any = directory
        self.display = display
        self.strategy = strategy or tf.distribute.get_strategy()
        self.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.steps: list[dict] = []
        self.failures: list[CheckFailed] = []
        self._models: dict[str, keras.Model] = {}

    def end_step(self, name: str, status: str, seconds: float, message: str = "", result: Any = None) -> None:
        """Notes how a step ended: "done", "resumed", "skipped" or "failed"."""
        self.steps.append({"name": name, "status": status, "seconds": seconds, "message": message, "result": result})
        if self.display:
            self.display.done(name, status, seconds, message)

    @cached_property
    def dataset(self) -> Dataset:
        data = self.recipe.data
        dataset = load_dataset(
            data.source,
            path=data.path,
            image_size=data.image_size,
            validation_fraction=data.validation_fraction,
            seed=self.recipe.seed,
            **data.options,
        )
        self._require_same_data(dataset)
        return dataset

    def _require_same_data(self, dataset: Dataset) -> None:
        """A run that goes on with other data would mix two: batches are found by the numbers of samples."""
        before = (self.directory.result("data") or {"result": {}})["result"]
        now = _describe(dataset)
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
        if changed:
            raise DataError(
                f"The data of source '{dataset.name}' has changed since '{self.directory.path}' was started: "
                f"{'; '.join(changed)}. Put it back as it was, or start a new run with another --out."
            )

    @cached_property
    def test(self) -> tuple[Samples, np.ndarray]:
        limit = self.recipe.evaluate.limit
        return self.dataset.test.x[:limit], self.dataset.test.y[:limit]

    @property
    def variants(self) -> list[str]:
        return ["float", "ptq", "qat"] if self.recipe.qat.enabled else ["float", "ptq"]

    def keep_model(self, variant: str, model: keras.Model) -> None:
        if self.strategy.num_replicas_in_sync == 1:  # else it is read back, with variables of one device
            self._models[variant] = model
        self.directory.write(f"models/{variant}.keras", model.save)

    def model(self, variant: str) -> Any:
        if variant not in self._models:
            self._models[variant] = models.load_model(self.directory.path / "models" / f"{variant}.keras")
        return self._models[variant]

    def reference(self, variant: str) -> QuantizedModel | None:
        """The model whose weights count as float where those of `variant` do not: PTQ's, once rounding is learned."""
        return find_reference(self.directory.path / "models" / f"{variant}.keras")

    def file(self, variant: str) -> bytes:
        return (self.directory.path / f"{variant}.tflite").read_bytes()

    def keep_file(self, variant: str, content: bytes) -> int:
        """Writes a `.tflite` file with its metadata, and programs that run it; returns its bytes."""
        if self.recipe.convert.metadata:
            try:
                content = with_metadata(content, self.dataset, self.recipe.name, self.recipe.description)
            except MobileQatError as error:  # a class name of two lines
                _say(self, f"{variant}.tflite has no metadata: {error}")
        path = self.directory.write_bytes(f"{variant}.tflite", content)
        if variant != "float":
            try:
                for language in snippets.LANGUAGES:
                    text = snippets.write_snippet(path, language)
                    self.directory.write_text(snippets.file_name(path, language), text)
            except MobileQatError as error:
                _say(self, f"There is no program that runs {variant}.tflite beside it: {error}")
        return len(content)

    def keep_outputs(self, variant: str, interpreter: np.ndarray, simulation: np.ndarray | None) -> None:
        arrays = {"interpreter": interpreter} | ({} if simulation is None else {"simulation": simulation})
        self.directory.write(f"outputs/{variant}.npz", lambda path: np.savez(path, allow_pickle=False, **arrays))

    def outputs(self, variant: str) -> dict[str, np.ndarray]:
        with np.load(self.directory.path / "outputs" / f"{variant}.npz") as arrays:
            return dict(arrays)

    @property
    def policy(self) -> str:
        """The dtype policy of layers while they are trained."""
        precision = self.recipe.precision
        return precision if precision == "float32" else f"mixed_{precision}"

    def log_dir(self, step: str) -> Path | None:
        """Where TensorBoard's events of a training go; workers beside the chief leave none."""
        return None if worker_index(self.strategy) else self.directory.path / "tensorboard" / step

    def training_callbacks(self, name: str, epochs: int) -> list[keras.callbacks.Callback]:
        return [self.display.training(name, epochs)] if self.display else []

    def fail(self, failure: CheckFailed) -> None:
        """Remembers a check that failed; the run goes on, so that the report can show it."""
        self.failures.append(failure)


# ------------------------------------------------------------------ steps


def _data(run: Run) -> dict:
    _check_targets(run)
    data, count = run.dataset, run.recipe.data.calibration_samples
    if missing := classes_not_calibrated(data, count, run.recipe.seed):
        _say(run, f"Calibration sees no sample of {', '.join(missing)}: ranges may not hold what these classes give.")
    return {
        "source": run.recipe.data.source,
        **_describe(data),
        "calibration": min(count, len(data.train.x)),
        "not_calibrated": missing,
    }


def _describe(data: Dataset) -> dict:
    """What has to be the same when a run goes on."""
    sizes = {"train": len(data.train.x), "validation": len(data.validation.x), "test": len(data.test.x)}
    return {"class_names": list(data.class_names), **sizes}


def _check_targets(run: Run) -> None:
    """What a target lacks is said before any training, not after it."""
    settings = run.recipe.bench
    for target in map(parse_target, settings.targets if settings.enabled else ()):
        require_target(target)


def _float(run: Run) -> dict:
    recipe, data = run.recipe, run.dataset
    keras.utils.set_random_seed(recipe.seed)

    def build():
        if recipe.model.name is None:
            raise ModelError(
                f"'{recipe.model.weights}' holds weights without a model. Name the model they belong to: model.name"
            )
        return models.build_model(recipe.model.name, data.train.x.shape[1:], len(data.class_names), recipe.model.args)

    with run.strategy.scope():
        model = models.load_model(recipe.model.weights, build) if recipe.model.weights else build()
    if not getattr(model, "inputs", None):  # subclassed: as one layer on the data's inputs
        inputs = keras.Input(data.train.x.shape[1:], name="input")
        model = keras.Model(inputs, model(inputs), name=model.name)
    # What cannot be quantized or trained on this data is reported now, before any time goes into training.
    plan = quantize_model(model, **_plan_options(run, model)).plan
    _check_fits(model, data)
    _announce_borders(run, plan)
    models.check_finite_weights(model)
    if recipe.qat.from_scratch:
        run.directory.write("models/initial.keras", model.save)  # as it is now; training changes it
    history = _fit(run, "float", model, recipe.float)
    models.check_finite_weights(model)
    run.keep_model("float", model)
    return {
        "model": {"name": recipe.model.name or model.name, "parameters": model.count_params()},
        "training": vars(history),
    }


def _fit(run: Run, step: str, model: keras.Model, settings: Training, teacher: keras.Model | None = None) -> History:
    """Trains a model in place, in the recipe's precision."""
    trained = model
    if run.policy != "float32":
        with run.strategy.scope():
            trained = models.with_policy(model, run.policy)
    try:
        return fit(
            trained,
            run.dataset,
            settings,
            augment=run.recipe.data.augment,
            seed=run.recipe.seed,
            teacher=teacher,
            callbacks=run.training_callbacks(step, settings.epochs),
            log_dir=run.log_dir(step),
            storage=run.directory.checkpoint(step),
        )
    finally:
        if trained is not model:
            model.set_weights(trained.get_weights())


def _plan_options(run: Run, model: keras.Model) -> dict:
    """What a recipe says of quantization, and the size to plan for where the model leaves it open."""
    settings = run.recipe.quantize
    scheme = replace(get_scheme(settings.scheme), narrow_storage=settings.narrow_storage)
    sizes = [size for tensor in getattr(model, "inputs", None) or [] for size in tensor.shape[1:]]
    shape = run.dataset.train.x.shape[1:] if None in sizes or not sizes else None
    keys = ("exclude", "layers", "weight_range", "learn_activation_ranges")
    return {"scheme": scheme, "input_shape": shape} | {key: getattr(settings, key) for key in keys}


def _announce_borders(run: Run, plan: QuantPlan) -> None:
    """Says what the excluded layers cost, before any training."""
    if not run.recipe.quantize.exclude:
        return
    in_float = [operator.name for operator in plan.operators if not operator.quantized and operator.kind != GONE]
    borders = plan.borders()
    lines = [f"{len(in_float)} operators stay in float, as excluded, at {len(borders)} conversions:"]
    lines += [f"{b['conversion']} of {b['tensor']}, read by {', '.join(b['read_by']) or 'the output'}" for b in borders]
    for line in lines:
        _say(run, line)


def _say(run: Run, line: str) -> None:
    if run.display:
        run.display.say(line)


def _check_fits(model: keras.Model, data: Dataset) -> None:
    inputs, outputs = [tuple(x.shape) for x in model.inputs], [tuple(x.shape) for x in model.outputs]
    sample, classes = data.train.x.shape[1:], len(data.class_names)
    is_open = len(inputs) == 1 and len(inputs[0]) == len(sample) + 1
    if not is_open or any(size not in (None, given) for size, given in zip(inputs[0][1:], sample, strict=True)):
        remedy = _remedy(inputs, sample)
        raise ModelError(
            f"Model '{model.name}' takes inputs of shape {inputs}. The data's samples are {sample}.{remedy}"
        )
    if outputs != [(None, classes)]:
        raise ModelError(
            f"Model '{model.name}' has outputs of shape {outputs}. The data has {classes} classes: expected one output "
            f"of shape (None, {classes})."
        )


def _remedy(inputs: Sequence[tuple], sample: tuple[int, ...]) -> str:
    """How images become what a model takes; nothing where it takes no image."""
    if len(inputs) != 1 or len(inputs[0]) != 4 or len(sample) != 3 or inputs[0][3] not in (1, 3):
        return ""
    _, height, width, channels = inputs[0]
    remedies = [f"data.options: {{channels: {channels}}}"] if channels != sample[2] else []
    if None not in (height, width) and (height, width) != sample[:2]:
        remedies.append(f"data.image_size: [{height}, {width}]")
    return f" Image folders and TFRecord files are read as that with {' and '.join(remedies)}."


def _ptq(run: Run) -> dict:
    recipe = run.recipe
    model = _quantize(run, run.model("float"))
    samples = _calibration_samples(run)
    equalized = equalize(model) if recipe.quantize.equalize else []
    _calibrate(run, model, samples)
    check_ranges(model)
    if _rounding_steps(model, recipe.quantize.adaround):
        # Learned rounding moves the weights onto their grid; what that costs shows beside those from before it.
        run.directory.write(f"models/{CALIBRATED}.keras", model.save)
    rounded = _adaround(model, run.dataset, recipe.quantize.adaround, recipe.seed)
    corrected = BiasCorrection({}, {})
    if recipe.quantize.correct_bias:
        corrected = correct_bias(model, samples, reference=run.reference("ptq"))
    run.keep_model("ptq", model)
    preparation = list(_preparation(recipe.quantize, equalized, rounded, corrected))
    for line in preparation:
        _say(run, line)
    return {
        "plan": plan_rows(model),
        "preparation": preparation,
        "islands": plot_data.islands(model.plan, recipe.quantize.exclude),
        "equalized": [vars(pair) for pair in equalized],
        "rounded": [vars(row) for row in rounded],
        "bias_not_corrected": corrected.skipped,
    }


def _preparation(
    settings: Quantize, equalized: list[Pair], rounded: list[Rounding], corrected: BiasCorrection
) -> Iterator[str]:
    """What was done to the weights before any training, a sentence each."""
    if settings.equalize:
        yield f"Equalized the weights of {_count(equalized, 'pair')} of layers."
    if rounded:
        moved = np.average([row.moved for row in rounded], weights=[row.weights for row in rounded])
        errors = [row.error / row.error_before for row in rounded if row.error_before > 0]
        error = f"; the output error is {np.median(errors):.2f} of rounding to nearest (median)" if errors else ""
        yield f"Learned to round {_count(rounded, 'layer')}: {moved:.0%} of the weights go to the other integer{error}."
    if settings.correct_bias:
        left = [f"; not of '{name}': {reason}" for name, reason in corrected.skipped.items()]
        yield f"Corrected the biases of {_count(corrected.shifts, 'layer')}{''.join(left)}."


def _count(items: Sized, what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def _quantize(run: Run, model: keras.Model) -> QuantizedModel:
    known = run.recipe.quantize.input_range
    return quantize_model(
        model,
        input_range=run.dataset.value_range if known == "data" else known,
        ema_decay=run.recipe.qat.ema_decay,
        **_plan_options(run, model),
    )


def _calibration_samples(run: Run) -> np.ndarray:
    return calibration_samples(run.dataset, run.recipe.data.calibration_samples, run.recipe.seed)


def _calibrate(run: Run, model: QuantizedModel, samples: np.ndarray) -> None:
    settings = run.recipe.quantize
    calibrate(model, samples, settings.calibration, percentile=settings.percentile)


def _rounding_steps(model: QuantizedModel, settings: AdaRound) -> int:
    """Steps of AdaRound: by default some where weights are coarse, and none elsewhere."""
    if settings.steps is not None:
        return settings.steps
    specs = [operator.weight_spec for operator in model.plan.operators]
    return DEFAULT_STEPS if any(spec is not None and spec.is_coarse for spec in specs) else 0


def _adaround(model: QuantizedModel, dataset: Dataset, settings: AdaRound, seed: int) -> list[Rounding]:
    steps = _rounding_steps(model, settings)
    if steps == 0:
        return []
    fitting = max(LAYERWISE_BYTES // bytes_per_sample(model), 1)
    samples = calibration_samples(dataset, min(settings.samples, fitting), seed)
    rest = settings.model_dump(exclude={"steps", "samples"})
    return adaround(model, samples, steps=steps, seed=seed, **rest)


def _qat(run: Run) -> dict | None:
    if not run.recipe.qat.enabled:
        return None
    with run.strategy.scope():
        if run.recipe.qat.from_scratch:
            model, samples = _quantize(run, run.model("initial")), _calibration_samples(run)
            _calibrate(run, model, samples)
            # BatchNormalization that was never trained changes nothing: these ranges are of far smaller values than
            # those of a training step, which would give no gradient to what lies beyond.
            train_with(model, quantizing=False)
            reestimate_batch_norm(model, [samples[i : i + 64] for i in range(0, len(samples), 64)])
            train_with(model)
            _calibrate(run, model, samples)
        else:
            # A copy by way of the file: the PTQ model stays as it was calibrated.
            model = models.load_model(run.directory.path / "models" / "ptq.keras")
    try:
        history = _fit(run, "qat", model, run.recipe.qat, run.model("float"))
    except TrainingError as error:
        run.directory.checkpoint("qat").delete()  # it leads where this one did
        path = run.directory.write("models/qat_last_good.keras", model.save)
        raise TrainingError(f"{error} It is kept in '{path}'.") from error
    run.keep_model("qat", model)
    if history.best_epoch == 0:
        _say(run, "No epoch of QAT validated as well as the weights before it: these are kept.")
    if history.reestimated is False:
        _say(run, "BatchNormalization statistics taken anew validated worse: those of the training are kept.")
    training = vars(history) | {"ranges": plot_data.thinned(history.ranges)}
    return {"training": training, "plan": plan_rows(model)}


def plan_rows(model: QuantizedModel) -> list[dict]:
    """The plan's rows with the scale, zero point and real range that each tensor has now."""
    rows = model.plan.rows()
    for row in rows:
        quantizer = model.quantizers.get(row["tensor"])
        if quantizer is None:
            continue
        scale, zero_point = quantizer.grid()
        row["scale"], row["zero_point"] = float(scale), zero_point
        row["minimum"], row["maximum"] = quantizer.ends()
    return rows


def _convert(run: Run) -> dict:
    settings = run.recipe.convert
    sizes = {}
    for variant in run.variants:
        if variant == "float":
            model = run.model("float")
            shape = _plan_options(run, model)["input_shape"]
            content = convert_float(model, batch_size=settings.batch_size, input_shape=shape)
        else:
            content = convert(run.model(variant), **settings.model_dump(exclude={"metadata"}))
        sizes[variant] = {"file": f"{variant}.tflite", "size_bytes": run.keep_file(variant, content)}
    return sizes


def _inspect(run: Run) -> dict:
    rows = {}
    for variant in run.variants:
        content = run.file(variant)
        result = flatbuffer.inspect(content)
        rows[variant] = result.to_dict() | {"sha256": hashlib.sha256(content).hexdigest()}
        if variant == "float":
            continue
        excluded = _excluded_tensors(run, variant)
        islands = [row for row in result.islands if not excluded.isdisjoint(row.tensor_names)]
        if len(islands) < len(result.islands) or (result.problems and not excluded):
            problems = "\n".join(f"  - {problem}" for problem in result.problems)
            run.fail(InspectionError(f"{variant}.tflite is not fully integer:\n{problems}"))
        elif excluded:
            rows[variant] |= {"problems": [], "excluded": [row.operator_name for row in islands]}
    return rows


def _excluded_tensors(run: Run, variant: str) -> set[str]:
    """Names in the file of what the layers that the recipe excludes compute in float."""
    if not run.recipe.quantize.exclude:
        return set()
    outputs = {op.output for op in run.model(variant).plan.operators if not op.quantized}
    # "shifted": a float RSQRT adds its epsilon first.
    return outputs | {f"{name}/{part}" for name in outputs for part in ("float32", "shifted")}


def _parity(run: Run) -> dict:
    settings = run.recipe.parity
    bars = parity.Bars(**settings.model_dump(exclude={"samples"}))
    x, _ = run.test
    results: dict[str, Any] = {}
    for variant in run.variants:
        runtime = run.recipe.evaluate.runtime
        interpreted = in_batches(Session(run.file(variant), runtime, run.recipe.evaluate.threads).predict, x)
        simulated = in_batches(partial(parity.simulate, run.model(variant)), x)
        run.keep_outputs(variant, interpreted, simulated)
        if variant == "float":
            continue
        # The recipe's bars are for the default runtime, whatever evaluates; others round in their own ways.
        if runtime != "litert":
            interpreted = in_batches(Session(run.file(variant), "litert").predict, x)
        result = parity.verify(
            run.model(variant),
            run.file(variant),
            np.asarray(x[: settings.samples]),
            bars=bars,
            operator_samples=settings.samples,
            simulated=simulated,
            interpreted=interpreted,
        )
        results[variant] = result.to_dict()
        if not result.passed:
            problems = "\n".join(f"  - {problem}" for problem in result.problems)
            run.fail(ParityError(f"{variant}.tflite does not compute what was trained:\n{problems}"))
    return results


def _layers(run: Run) -> dict:
    """Noise of each layer and the graph of the last integer file: no check, only what the report draws."""
    integer = [variant for variant in run.variants if variant != "float"]
    has_plan = run.recipe.engine == "native"
    samples = np.asarray(run.test[0][: max(plot_data.SAMPLES)])
    layers = {v: plot_data.noise(run.model(v), samples, run.reference(v)) for v in integer if has_plan}
    return {"layers": layers, "graph": {"variant": integer[-1], **plot_data.graph(run.file(integer[-1]))}}


def _evaluate(run: Run) -> dict:
    _, labels = run.test
    reference = top1(run.outputs("float")["interpreter"], labels)
    results = {}
    for variant in run.variants:
        outputs = run.outputs(variant)
        results[variant] = {
            "accuracy": {
                "samples": len(labels),
                "interpreter": accuracy(outputs["interpreter"], labels),
                # TensorFlow's converter calibrates and rounds in one: its PTQ has no simulation.
                "simulation": accuracy(outputs["simulation"], labels) if "simulation" in outputs else None,
            },
            "per_class": per_class(outputs["interpreter"], labels, run.dataset.class_names),
            "agreement_with_float": float(np.mean(top1(outputs["interpreter"], labels) == reference)),
        }
    return results


def _bench(run: Run) -> dict | None:
    settings = run.recipe.bench
    if not settings.enabled:
        return None
    files = {variant: run.file(variant) for variant in run.variants}
    vectors = {variant: raw_vectors(content, np.asarray(run.test[0][:VECTORS])) for variant, content in files.items()}
    records: dict[str, list[dict]] = {variant: [] for variant in files}
    for target in map(parse_target, settings.targets):
        taken = {v: content for v, content in files.items() if v != "float" or not target.integer_only}
        for threads in settings.threads if target.name == "host" else settings.threads[:1]:
            how = Settings(threads=threads, warmup=settings.warmup, runs=settings.runs, cpus=settings.cpus)
            comparison = measure(taken, target, how, vectors=vectors)
            _judge(run, comparison.records, settings.min_delegated)
            is_first = target.name == "host" and threads == settings.threads[0]
            profiles = measure(taken, target, replace(how, **PROFILED), samples=0).records if is_first else {}
            for variant, record in comparison.records.items():
                if record.peak_memory_bytes is None and record.unit == "ms":
                    # Memory is a process's: each file is loaded once more on its own.
                    alone = measure({variant: files[variant]}, target, replace(how, warmup=1, runs=5), samples=0)
                    record = replace(record, peak_memory_bytes=alone.records[variant].peak_memory_bytes)
                if profiles:
                    record = replace(record, profile=profiles[variant].profile)
                ratio = {"ratio_to_float": vars(comparison.ratios[variant])} if "float" in taken else {}
                records[variant].append(record.to_dict() | ratio)
    return records


def _judge(run: Run, records: dict[str, Record], min_delegated: float) -> None:
    """Checks the integer files on a target: the same outputs as here, and enough operators on the delegate."""
    integer = {f"{variant}.tflite": record for variant, record in records.items() if variant != "float"}
    if problems := disagreements(integer):
        run.fail(ParityError("\n".join(problems)))
    if min_delegated:
        try:
            require_delegated({name: record for name, record in integer.items() if record.delegate}, min_delegated)
        except DelegationError as error:
            run.fail(error)


STEPS: dict[str, Callable[[Run], Any]] = {
    "data": _data,
    "float": _float,
    "ptq": _ptq,
    "qat": _qat,
    "convert": _convert,
    "inspect": _inspect,
    "parity": _parity,
    "layers": _layers,
    "evaluate": _evaluate,
    "bench": _bench,
}
ENGINES: dict[str, dict[str, Callable[[Any], Any]]] = {"native": STEPS, "tfmot": STEPS | tfmot.STEPS}


# ------------------------------------------------------------------ running


def train(recipe: Recipe, directory: Path, *, resume: bool = False, display: Display | None = None) -> dict:
    """Runs a recipe; a worker beside the chief of `distribute: multi_worker` takes part in its trainings alone.

    Args:
        recipe: from `load_recipe`.
        directory: the run directory, new unless `resume`.
        resume: skip the steps that finished before.
        display: shows progress.

    Returns:
        The content of report.json; nothing for a worker beside the chief.

    Raises:
        CheckFailed: everything ran, and a file is not fully integer or misses parity; the report shows it.
        MobileQatError: a step could not be carried out; what came before it is kept for `resume`.
    """
    if recipe.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = make_strategy(recipe.distribute)
    if worker_index(strategy):
        with models.own_classes(recipe.model.name):
            _take_part(Run(recipe, SharedDirectory(directory), None, strategy))
        return {}
    # A resumed run reads models with layers of the user's without building them; TFMOT's are built in another process.
    with models.own_classes(recipe.model.name if recipe.engine == "native" else None):
        run = Run(recipe, RunDirectory(directory, dump_recipe(recipe), resume), display, strategy)
        return _run_steps(run)


def _run_steps(run: Run) -> dict:
    try:
        run.directory.write_json("environment.json", environment() | {"packages": installed_packages()})
        for name, step in ENGINES[run.recipe.engine].items():
            _run_step(run, name, step)
        results = write_report(run)
    except BaseException:
        # The report shows how far the run came, and why it ended; that error matters more than one in writing it.
        with suppress(MobileQatError, OSError):
            write_report(run)
        raise
    finally:
        run.directory.close()
    if run.failures:
        raise run.failures[0]
    return results


def _take_part(run: Run) -> None:
    """What a worker beside the chief does: the trainings that the chief carries out."""
    for name in TRAINED_TOGETHER:
        with lost_workers(run.strategy):
            if from_chief(run.strategy, 0):
                keras.utils.set_random_seed(run.recipe.seed)
                ENGINES["native"][name](run)


def _run_step(run: Run, name: str, step: Callable[[Run], Any]) -> None:
    # Kept only if every step before it was: a step done anew may have other results.
    is_kept = all(step["status"] == "resumed" for step in run.steps)
    finished = run.directory.result(name) if is_kept else None
    if finished is not None or not is_kept:
        run.directory.checkpoint(name).delete()  # of a step that has ended, or that followed others
    if run.display:
        run.display.step(name)
    if is_multi_worker(run.strategy) and name in TRAINED_TOGETHER:
        with lost_workers(run.strategy):
            from_chief(run.strategy, int(finished is None))
    if finished is not None:
        run.end_step(name, "resumed", finished["seconds"], result=finished["result"])
        return
    started, failures_before = time.perf_counter(), len(run.failures)
    # Each step starts from the seed, so that a resumed run goes on as the run that was not interrupted.
    keras.utils.set_random_seed(run.recipe.seed)
    try:
        with lost_workers(run.strategy):
            result = step(run)
    except (Exception, KeyboardInterrupt) as error:
        message = str(error) or type(error).__name__
        run.end_step(name, "failed", time.perf_counter() - started, message=message)
        error.__notes__ = [*getattr(error, "__notes__", []), _how_to_go_on(run, name)]  # add_note is new in 3.11
        raise
    seconds = time.perf_counter() - started
    if failures := run.failures[failures_before:]:
        run.end_step(name, "failed", seconds, "\n".join(map(str, failures)), result)
        return
    run.directory.finish(name, {"seconds": seconds, "result": result})
    run.end_step(name, "skipped" if result is None else "done", seconds, result=result)


def _how_to_go_on(run: Run, name: str) -> str:
    """What is left of a run whose step did not finish; its own recipe.yaml holds every --set."""
    directory = run.directory.path
    if len(run.steps) == 1:
        return f"Step '{name}' did not finish. No step came before it: start again, also with --out {directory}."
    command = shlex.join(["mobileqat", "train", str(directory / "recipe.yaml"), "--out", str(directory), "--resume"])
    return f"Step '{name}' did not finish. What came before it is kept. To go on: {command}"


def write_report(run: Run) -> dict:
    """Writes report.json and what shows it of a run, finished or not; returns the former's content."""
    results = collect(run)
    run.directory.write_json("report.json", results)
    report.write_report(results, run.directory.path)
    return results


def collect(run: Run) -> dict:
    """Everything that the report shows, as one JSON-able dict; what was not reached is empty."""
    results: dict[str, dict] = {name: {} for name in STEPS}
    results.update({step["name"]: step["result"] or {} for step in run.steps})
    variants = {
        variant: {
            **results["convert"].get(variant, {}),
            **results["evaluate"].get(variant, {}),
            "inspection": results["inspect"].get(variant),
            "parity": results["parity"].get(variant),
            "layers": results["layers"].get("layers", {}).get(variant),
            "bench": results["bench"].get(variant, []),
        }
        for variant in run.variants
    }
    return {
        "schema_version": 1,
        "mobileqat": metadata.version("mobileqat"),
        "name": run.recipe.name,
        "description": run.recipe.description,
        "created": run.created,
        "seconds": sum(step["seconds"] for step in run.steps),
        "verdict": report.decide(variants, run.recipe.report.ship_margin),
        "recipe": run.recipe.model_dump(mode="json"),
        "data": results["data"],
        "model": results["float"].get("model"),
        "variants": variants,
        "training": {name: results[name]["training"] for name in ("float", "qat") if results[name].get("training")},
        "plan": results["qat"].get("plan") or results["ptq"].get("plan"),
        "graph": results["layers"].get("graph"),
        "preparation": results["ptq"].get("preparation") or [],
        "islands": results["ptq"].get("islands"),
        "steps": [{key: value for key, value in step.items() if key != "result"} for step in run.steps],
        "environment": environment() | results["float"].get("packages", {}),
    }


def installed_packages() -> dict[str, str]:
    """Version of every installed package."""
    return dict(sorted((package.metadata["Name"], package.version) for package in metadata.distributions()))


def environment() -> dict:
    """Versions of everything that decides a result, and the machine."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "machine": describe_machine()}


# ------------------------------------------------------------------ single steps, for the other commands


def load_data(
    source: str,
    path: str | None = None,
    image_size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Dataset:
    """A dataset by name, as in a recipe's `data` section."""
    if source in get_args(PathSource) and path is None:
        raise DataError(f"--data {source} reads a file or folder of yours. Say which: --data-path PATH.")
    return load_dataset(source, path=path, image_size=image_size or None, **options or {})


def with_metadata(content: bytes, dataset: Dataset, name: str, description: str = "") -> bytes:
    """A file with the labels and the kind of input of the data it was made for."""
    shape = dataset.train.x.shape[1:]
    return add_metadata(content, describe(name, description, dataset.class_names, shape, dataset.value_range))


def convert_model(
    model: keras.Model,
    dataset: Dataset | None,
    scheme: str,
    method: str,
    samples: int,
    input_type: str,
    output_type: str,
    ranges: Path | None = None,
) -> bytes:
    """Converts a quantized model as it is, or a float model with ranges from `dataset`, imported ones, or both."""
    quantized = _quantized(model, dataset, scheme, method, samples, ranges)
    if quantized is not model and dataset is not None:
        _adaround(quantized, dataset, AdaRound(), seed=0)
    return convert(quantized, input_type=input_type, output_type=output_type)


def _quantized(
    model: keras.Model,
    dataset: Dataset | None,
    scheme: str,
    method: str,
    samples: int,
    ranges: Path | None = None,
) -> QuantizedModel:
    if isinstance(model, QuantizedModel):
        return model
    if dataset is None and ranges is None:
        raise MobileQatError(
            f"Model '{model.name}' is float; its activation ranges must come from data. Add --data SOURCE."
        )
    # An imported range of the input counts more than what is known of the data.
    model = quantize_model(model, scheme, input_range=dataset.value_range if dataset and not ranges else None)
    if dataset is not None:
        calibrate(model, calibration_samples(dataset, samples, seed=0), method)
    if ranges is not None:
        missing = set_ranges(model, ranges).missing
        if missing and dataset is None:
            raise CalibrationError(
                f"'{ranges}' has no range for {len(missing)} tensors: {', '.join(missing[:5])}. Add --data SOURCE "
                "to calibrate them."
            )
    return model


def find_reference(path: Path) -> QuantizedModel | None:
    """The model that a run's `ptq.keras` was before its rounding was learned; None for other files."""
    calibrated = path.with_name(f"{CALIBRATED}.keras")
    return models.load_model(calibrated) if path.name == "ptq.keras" and calibrated.is_file() else None


def analyze_model(path: Path, dataset: Dataset, scheme: str, method: str, samples: int, limit: int) -> Analysis:
    """What each layer of a quantized model costs, or of a float model quantized as by `convert`, on validation samples.

    Args:
        path: of the model. A run's `ptq.keras` is compared with the `calibrated.keras` beside it.
        dataset: calibrates, and validates.
        scheme: for a float model, like `method` and `samples`.
        method: of calibration.
        samples: training samples for it.
        limit: validation samples.
    """
    x, labels = np.asarray(dataset.validation.x[:limit]), dataset.validation.y[:limit]
    loaded, reference = models.load_model(path), find_reference(path)
    model = _quantized(loaded, dataset, scheme, method, samples)
    if model is not loaded and _adaround(model, dataset, AdaRound(), seed=0):
        reference = _quantized(loaded, dataset, scheme, method, samples)
    return analyze(model, x, lambda outputs: accuracy(outputs, labels), reference=reference)


def search_model(
    path: Path,
    data: Mapping[str, Any],
    schemes: Sequence[str],
    budget: Budget,
    samples: int,
    limit: int,
    with_float: bool = False,
) -> tuple[Recipe, dict]:
    """Finds a mixture of schemes under a budget, and verifies points of its front by real conversions.

    Args:
        path: of a float model.
        data: a recipe's `data` section.
        schemes: to choose from; the first is where the search starts.
        budget: what is bounded, and by how much.
        samples: training samples for calibration.
        limit: validation samples for the search, test samples for the verification.
        with_float: let layers stay in float.

    Returns:
        A recipe that trains the chosen mixture, and the search as one JSON-able dict.

    Raises:
        MobileQatError: nothing fits the budget.
    """
    model = models.load_model(path)
    if isinstance(model, QuantizedModel):
        raise ModelError(f"Model '{model.name}' is quantized already. search takes the float model.")
    values = {
        "name": f"{re.sub(r'[^A-Za-z0-9._-]+', '_', path.stem).strip('._-') or 'model'}-mixed",
        "description": f"{path.stem} in mixed precision, {budget.what} at most {budget.text}",
        "data": {**data, "calibration_samples": samples},
        "model": {"weights": str(path)},
        "quantize": {"scheme": schemes[0]},
    }
    recipe = parse_recipe(json.dumps(values, default=str), file="search")
    dataset = load_data(recipe.data.source, recipe.data.path, recipe.data.image_size, recipe.data.options)
    calibration = calibration_samples(dataset, samples, seed=0)

    def quantized(**chosen: Any) -> QuantizedModel:
        result = quantize_model(model, **chosen, input_range=dataset.value_range)
        calibrate(result, calibration)
        return result

    def file(model: QuantizedModel) -> bytes:
        """As `train` writes it."""
        content = convert(model)
        with suppress(MobileQatError):  # class names that metadata cannot hold
            return with_metadata(content, dataset, recipe.name, recipe.description)
        return content

    uniform = {scheme: quantized(scheme=scheme) for scheme in schemes}
    costs, base = _costs(uniform, quantized, file, budget.what, with_float)
    bound = budget.bound(base + sum(costs[schemes[0]].values()))
    x, labels = np.asarray(dataset.validation.x[:limit]), dataset.validation.y[:limit]
    unit = " B" if budget.what == "size" else " ms"
    found = search(uniform, costs, bound, x, lambda outputs: accuracy(outputs, labels), base, unit=unit)
    x, labels = np.asarray(dataset.test.x[:limit]), dataset.test.y[:limit]
    verified = []
    for mixture in dict.fromkeys((found.front[0].key, found.chosen.key, found.front[-1].key)):
        result = quantized(**options(dict(mixture)))
        correct_bias(result, calibration)  # the quick stand-in for the AdaRound of the recipe's run
        content = file(result)
        row = {"size_bytes": len(content), "accuracy": accuracy(np.asarray(Session(content).predict(x)), labels)}
        verified.append({"choices": dict(mixture), **row})
    chosen = recipe.model_dump()
    chosen["quantize"] |= options(found.chosen.choices)
    return Recipe.model_validate(chosen), {"budget": bound, "what": budget.what, **asdict(found), "verified": verified}


def _costs(
    uniform: Mapping[str, QuantizedModel],
    quantized: Callable[..., QuantizedModel],
    file: Callable[[QuantizedModel], bytes],
    what: str,
    with_float: bool,
) -> tuple[dict[str, dict[str, float]], float]:
    """What every layer with weights costs by choice, and what the rest of the file does."""
    first = next(iter(uniform.values()))
    sizes = weight_bytes(uniform, with_float)
    if what == "size":
        return sizes, len(file(first)) - sum(next(iter(sizes.values())).values())
    files = {scheme: convert(model) for scheme, model in uniform.items()}
    if with_float:
        files[FLOAT] = convert(quantized(**options(dict.fromkeys(next(iter(sizes.values())), FLOAT))))
    comparison = measure(files, settings=Settings(profile=True))
    outputs = {first.operators[name].operator.output: name for name in next(iter(sizes.values()))}
    costs: dict[str, dict[str, float]] = {}
    for scheme, record in comparison.records.items():
        measured = {row.name.removesuffix("/float32"): row.cost for row in record.profile}
        costs[scheme] = {name: measured[output] for output, name in outputs.items()}
    rest = comparison.records[next(iter(uniform))].cost.median - sum(next(iter(costs.values())).values())
    return costs, max(rest, 0.0)


def verify_model(model: keras.Model, file: Path, dataset: Dataset | None, samples: int, runtime: str) -> parity.Parity:
    """Parity of a quantized model with a file, on test samples or on random ones from the inputs' grids."""
    if not isinstance(model, QuantizedModel):
        raise ModelError(
            f"Model '{model.name}' is float. verify compares a model saved after quantize_model with its file, such as "
            "models/qat.keras of a run directory; to score a float model use evaluate."
        )
    content = flatbuffer.read(file).content
    return parity.verify(
        model,
        content,
        np.asarray(dataset.test.x[:samples]) if dataset else _random_samples(model, samples),
        runtime=runtime,
    )


def verify_on_targets(
    file: Path, dataset: Dataset | None, samples: int, targets: Sequence[Target], settings: Settings
) -> dict[str, Agreement]:
    """Outputs of a file on each target against this machine's, on test samples or on random values."""
    if not targets:
        return {}
    model = flatbuffer.read(file)
    vectors = raw_vectors(model, np.asarray(dataset.test.x[:samples])) if dataset else random_vectors(model, samples)
    inner, count = before_softmax(model), len(model.outputs)
    exposed = flatbuffer.read(flatbuffer.expose_tensors(model.content, inner)) if inner else model
    (expected,) = host_outputs([Job("file", exposed, tuple(vectors))], settings)
    found = {}
    for target in targets:
        received = predict(exposed.content, target, vectors, settings)
        found[target.name] = compare_outputs(expected[:count], received[:count], bound_lsb(model, settings))
        if inner and bound_lsb(model, settings) is not None:
            found[f"{target.name}, before SOFTMAX"] = compare_outputs(expected[count:], received[count:])
    return found


def _random_samples(model: QuantizedModel, count: int) -> list[np.ndarray]:
    random, samples = np.random.default_rng(0), []
    for name in model.plan.inputs:
        tensor, quantizer = model.plan.tensors[name], model.quantizers.get(name)
        if not np.issubdtype(tensor.dtype, np.floating):
            samples.append(np.zeros((count, *tensor.shape), tensor.dtype))  # 0 is an index everywhere
            continue
        low, high = (0.0, 1.0) if quantizer is None else (quantizer.ranges().min(), quantizer.ranges().max())
        samples.append(random.uniform(low, high, (count, *tensor.shape)).astype(np.float32))
    return samples


def evaluate_file(path: Path, dataset: Dataset, limit: int | None, runtime: str, threads: int) -> dict:
    """Accuracy of a `.tflite` or Keras file on the test split."""
    if path.suffix not in (".tflite", ".keras", ".h5", ".hdf5"):
        raise MobileQatError(f"'{path}' is no model file. Expected one that ends in .tflite, .keras or .h5.")
    x, labels = dataset.test.x[:limit], dataset.test.y[:limit]
    if path.suffix == ".tflite":
        outputs = in_batches(Session(path, runtime, threads).predict, x)
    else:
        outputs, runtime = in_batches(partial(parity.simulate, models.load_model(path)), x), "keras"
    return {
        "file": str(path),
        "runtime": runtime,
        "samples": len(labels),
        "accuracy": accuracy(outputs, labels),
        "per_class": per_class(outputs, labels, dataset.class_names),
    }


__all__ = [
    "Run",
    "analyze_model",
    "convert_model",
    "environment",
    "evaluate_file",
    "load_data",
    "search_model",
    "train",
    "verify_model",
    "with_metadata",
    "write_whole",
]
