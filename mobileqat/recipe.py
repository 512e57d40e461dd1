"""The recipe: one YAML file that describes a run, read into frozen, validated objects.

This file owns the schema (one class per section), reading it (safe YAML, `--set` overrides, `${VAR}`
in paths) and writing it out with every default. All problems of a recipe are reported at once, one
line each: `file:line: key.path: what is wrong, expected ..., received ...`.

`python -m mobileqat.recipe` prints the JSON Schema that editors use to check and complete recipes.
"""

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from mobileqat.bench.targets import USAGES, find_row
from mobileqat.errors import DeviceError, RecipeError

# --- the schema ---------------------------------------------------------------------------------------


def _expected(words: str) -> WrapValidator:
    """Replace pydantic's errors, one for each member of a union, by a single "expected `words`"."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", "Input should be {words}", {"words": words}) from None

    return WrapValidator(check)


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError("the range is empty")
    return pair


def _target(name: str) -> str:
    try:
        find_row(name)
    except DeviceError as error:
        raise ValueError(str(error)) from None
    return name


def _conflict(key: str, problem: str) -> PydanticCustomError:
    """An impossible combination, reported at `key`, a path inside the section that found it."""
    return PydanticCustomError("conflict", "{problem}", {"key": key, "problem": problem})


PathlessSource = Literal["digits", "cifar10", "fashion_mnist", "fsdd", "kws01", "trashnet"]
PathSource = Literal["image_folder", "npz", "tfrecord"]
Engine = Literal["native", "tfmot"]
ReferenceModel = Literal["dscnn", "resnet8", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"]
SOURCES = f"{', '.join(get_args(PathlessSource) + get_args(PathSource))} or module:function"
MODELS = f"{', '.join(get_args(ReferenceModel))} or module:function"

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$"), _expected("letters, digits, '_', '-' and '.'")]
Line = Annotated[str, Field(pattern=r"^[^\r\n]+$"), _expected("one line of text")]
SourceName = Annotated[PathlessSource | PathSource | FunctionName, _expected(SOURCES)]
ModelName = Annotated[ReferenceModel | FunctionName, _expected(MODELS)]

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Threads = Annotated[int, Field(ge=1, le=64)]
# YAML knows lists only; `Strict(False)` lets one become a tuple, its items stay strict.
ImageSize = Annotated[
    Annotated[tuple[PositiveInt, PositiveInt], Strict(False)] | None,
    _expected("null or [height, width] in pixels"),
]
InputRange = Annotated[
    Annotated[tuple[float, float], Strict(False), AfterValidator(_ascending)] | Literal["data"] | None,
    _expected("'data', null or [lowest, highest]"),
]
ThreadCounts = Annotated[
    tuple[Threads, ...],
    Strict(False),
    Field(min_length=1),
    _expected("a list of thread counts, each from 1 to 64"),
]
TargetName = Annotated[str, AfterValidator(_target)]
TargetNames = Annotated[tuple[TargetName, ...], Strict(False), Field(min_length=1), _expected(f"a list of {USAGES}")]
SchemeName = Literal["w8a8", "w8a16", "w7a8", "w6a8", "w5a8", "w4a8", "w3a8", "w2a8", "w1a8"]
TensorType = Literal["auto", "int8", "uint8", "int16", "float32"]
Epochs = Annotated[int, Field(ge=0, description="passes over the training data")]
LearningRate = Annotated[float, Field(gt=0, description="learning rate after warm-up")]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no conversion between types, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Augment(Section):
    """Random changes to training images."""

    flip: bool = Field(default=False, description="mirror half of the images left to right")
    shift: int = Field(default=0, ge=0, description="largest shift along each axis, in pixels")
    cutout: int = Field(default=0, ge=0, description="side of a blanked square, in pixels; 0 for none")


class Data(Section):
    """Where examples come from. Calibration samples are drawn from the training part."""

    source: SourceName = Field(description=SOURCES)
    path: str | None = Field(
        default=None,
        description="folder or file of image_folder, npz and tfrecord; ${VAR} is read from the environment",
    )
    image_size: ImageSize = Field(default=None, description="[height, width] to resize to; null keeps the source's")
    validation_fraction: float = Field(
        default=0.1, gt=0, le=0.5, description="share of the training examples held out for validation"
    )
    calibration_samples: int = Field(default=512, ge=1, description="training examples that calibration sees")
    options: dict[str, Any] = Field(default={}, description="keyword arguments for the source")
    augment: Augment = Field(default=Augment(), description="random changes to training images")

    @model_validator(mode="after")
    def _path_fits_source(self) -> "Data":
        if self.source in get_args(PathSource) and self.path is None:
            raise _conflict("path", f"missing, expected the path that source {self.source} reads, received null")
        if self.source in get_args(PathlessSource) and self.path is not None:
            raise _conflict("path", f"has no use, expected null for source {self.source}, received {_shown(self.path)}")
        return self


class Model(Section):
    """The Keras model, and the weights it starts from."""

    name: ModelName | None = Field(default=None, description=f"{MODELS}; null for the whole model that weights holds")
    args: dict[str, Any] = Field(default={}, description="keyword arguments for the model function")
    weights: str | None = Field(
        default=None,
        description=".keras or .h5 file with weights or a whole model; ${VAR} is read from the environment",
    )

    @model_validator(mode="after")
    def _something_to_build(self) -> "Model":
        if self.name is None and self.weights is None:
            raise _conflict("name", f"missing, expected {MODELS}, or weights with a whole model, received nothing")
        return self


class Training(Section):
    """How to train; as it stands, the training of the float model."""

    epochs: Epochs = 0
    batch_size: int = Field(default=64, ge=1, description="examples per step")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(default="adam", description="Keras optimizer")
    learning_rate: LearningRate = 1e-3
    schedule: Literal["constant", "cosine"] = Field(default="cosine", description="learning rate over time")
    warmup_epochs: float = Field(default=0.0, ge=0, description="epochs of linear warm-up; fractions are allowed")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay per step, relative to the learning rate")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of each label spread over all classes")
    clip_norm: float | None = Field(default=None, gt=0, description="largest norm of all gradients together; null: any")
    weight_ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of the moving average of weights that is kept in their place; null: none",
    )

    @model_validator(mode="after")
    def _warmup_fits_epochs(self) -> "Training":
        if self.warmup_epochs > self.epochs:
            raise _conflict(
                "warmup_epochs",
                f"longer than the training, expected at most epochs = {self.epochs}, "
                f"received {_shown(self.warmup_epochs)}",
            )
        return self


class QatTraining(Training):
    """How to fine-tune with fake quantization."""

    enabled: bool = Field(default=True, description="false stops at post-training quantization")
    from_scratch: bool = Field(
        default=False, description="train from the weights that float training starts from, not from its result"
    )
    epochs: Epochs = 5
    learning_rate: LearningRate = 1e-4
    distillation: Share = Field(default=0.5, description="weight of the loss against the float model's outputs")
    temperature: float = Field(default=2.0, gt=0, description="temperature of the distillation softmax")
    distillation_features: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)] = Field(
        default=(), description="patterns of layer paths whose outputs follow the float model's, too, such as pool"
    )
    feature_weight: float = Field(default=1.0, gt=0, description="weight of the loss against those outputs")
    range_learning_rate: float = Field(
        default=1.0, gt=0, description="learning rate of trained ranges and weight scales, relative to learning_rate"
    )
    ema_decay: float = Field(default=0.99, gt=0, lt=1, description="decay of the moving activation ranges, per step")
    freeze_observers_after: Share = Field(
        default=0.5, description="share of training after which activation ranges stay as they are"
    )
    freeze_batch_norm_after: Share = Field(
        default=0.7,
        description="share of training after which batch normalization statistics stay as they are",
    )
    start_after: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the epochs, in float, after which quantization starts; the last one is always quantized",
    )
    estimator: Literal["clipped", "identity", "soft"] = Field(
        default="clipped",
        description="gradient of rounding; clipped: 0 beyond the range; identity: 1; soft: steep between integers",
    )
    damping: float = Field(
        default=0.0,
        ge=0,
        description="weight of a loss that pulls weights to their integers, against oscillation",
    )
    freeze_oscillations: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="freeze weights that flip to and fro in more steps than this share; 0: none",
    )
    reestimate_batch_norm: int = Field(
        default=0, ge=0, description="batches that batch normalization statistics are taken from anew at the end"
    )
    keep_best: bool = Field(default=True, description="keep the epoch with the best validation accuracy")


DEFAULT_PERCENTILE = 99.99


class AdaRound(Section):
    """Learned rounding of weights before any training (Nagel et al. 2020)."""

    steps: int | None = Field(
        default=None, ge=0, description="per layer; 0: to nearest; null: 300 where a kernel has 2 to 7 bits, else 0"
    )
    samples: int = Field(
        default=1024, ge=1, description="training examples; fewer where a layer's values on them would take over 2 GiB"
    )
    batch_size: int = Field(default=32, ge=1, description="examples per step")
    learning_rate: float = Field(default=0.03, gt=0, description="of Adam")


class Quantize(Section):
    """What is quantized to what, and how ranges are first found."""

    scheme: SchemeName = Field(default="w8a8", description="bits of weights and activations")
    layers: dict[str, SchemeName] = Field(
        default={}, description="other schemes for the weights of some layers, by pattern of their paths: block*: w4a8"
    )
    narrow_storage: bool = Field(
        default=True, description="store kernels of 4 bits and less as int4 where the runtime executes that"
    )
    weight_range: Literal["auto", "maxabs", "mse", "learned"] = Field(
        default="auto",
        description="scales of kernels: by the largest weight, by least squares, or trained from there; auto: learned "
        "for 2 to 7 bits, else maxabs",
    )
    learn_activation_ranges: bool = Field(
        default=False, description="train activation ranges like weights rather than follow the data"
    )
    calibration: Literal["minmax", "percentile", "mse"] = Field(
        default="minmax", description="how a range is taken from observed values"
    )
    percentile: float = Field(
        default=DEFAULT_PERCENTILE,
        gt=50,
        le=100,
        description="percent of values kept; only with calibration: percentile",
    )
    input_range: InputRange = Field(
        default="data",
        description="[lowest, highest]; data: the dataset's known range; null: from calibration",
    )
    exclude: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)] = Field(
        default=(), description="patterns of layer paths that stay in float, such as head/*"
    )

    equalize: bool = Field(
        default=False, description="even out the ranges of channels between consecutive layers first"
    )
    correct_bias: bool = Field(
        default=False, description="put back the means that rounding shifts; adaround needs it not"
    )
    adaround: AdaRound = Field(default=AdaRound(), description="learned rounding of weights")

    @model_validator(mode="after")
    def _percentile_fits_calibration(self) -> "Quantize":
        # Compared by value: a dumped recipe writes the default out, and has to load again.
        if self.calibration != "percentile" and self.percentile != DEFAULT_PERCENTILE:
            raise _conflict(
                "percentile",
                f"has no use, expected calibration: percentile beside it, received {self.calibration}",
            )
        return self


class Convert(Section):
    """The flatbuffer's interface."""

    input_type: TensorType = Field(default="auto", description="type of the input tensors; auto: the activations' own")
    output_type: TensorType = Field(default="auto", description="type of the output tensors, likewise")
    batch_size: int = Field(default=1, ge=1, description="static batch size of the flatbuffer")
    metadata: bool = Field(
        default=True,
        description="labels and input normalization inside the files, for Android's task libraries (uint8 or float32)",
    )


class Parity(Section):
    """How closely the interpreter must follow the Keras simulation. LSB: one step of the output scale."""

    samples: int = Field(default=64, ge=1, description="examples compared")
    min_identical_conv: Share = Field(
        default=0.9999,
        description="share of identical outputs, convolutions and dense layers on the same inputs",
    )
    min_identical_other: Share = Field(
        default=0.99, description="share of identical outputs, other operators on the same inputs"
    )
    max_lsb: int = Field(default=1, ge=0, description="largest difference of one operator's outputs, in LSB")
    min_top1_agreement: Share = Field(default=0.999, description="share of equal top-1 classes, end to end")
    min_identical_output: Share = Field(default=0.99, description="share of identical model outputs, end to end")


class Evaluate(Section):
    """Accuracy of the flatbuffers on the test set."""

    runtime: Literal["litert", "litert-reference", "tflite-runtime", "tf-lite"] = Field(
        default="litert", description="interpreter"
    )
    limit: int | None = Field(default=None, ge=1, description="test examples used; null for all")
    threads: Threads = Field(default=2, description="interpreter threads")


class Bench(Section):
    """What one inference costs, here and on other targets."""

    enabled: bool = Field(default=True, description="measure latency")
    targets: TargetNames = Field(default=("host",), description=f"where to measure: {USAGES}")
    threads: ThreadCounts = Field(
        default=(1,), description="thread counts to measure; on other targets than host the first"
    )
    warmup: int = Field(default=20, ge=0, description="runs before the measurement")
    runs: int = Field(default=200, ge=1, description="measured runs")
    cpus: str | None = Field(default=None, description="cores to run on, such as 0 or 4-7; on a phone also big, little")
    min_delegated: Share = Field(
        default=0.0, description="share of the operators that a delegate must take, on targets that tell"
    )


class Report(Section):
    """What the report concludes."""

    ship_margin: float = Field(
        default=0.1, ge=0, description="percentage points of accuracy that decide between QAT and PTQ"
    )


class Recipe(Section):
    """A whole run. `load_recipe` and `parse_recipe` make one from YAML, with readable errors."""

    name: Name = Field(description="the recipe's name: letters, digits, '_', '-' and '.'")
    description: Line = Field(description="one line for the list of recipes")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of every random generator")
    deterministic: bool = Field(
        default=False,
        description="use only operators that give the same bits in every run on one machine; some are slower",
    )
    distribute: Literal["none", "mirrored", "multi_worker"] = Field(
        default="none",
        description="train on one device, on all GPUs of this machine, or on the machines of TF_CONFIG",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="what layers compute in while training; weights, ranges and grids stay float32, files the same",
    )
    engine: Engine = Field(
        default="native",
        description="native: Keras 3 models; tfmot: tf_keras models, quantized by TensorFlow Model Optimization",
    )
    data: Data = Field(description="a section with at least `source`")
    model: Model = Field(description="a section with at least `name`")
    float: Training = Field(default=Training(), description="float training; 0 epochs use the weights as they are")
    quantize: Quantize = Field(default=Quantize(), description="quantization scheme and calibration")
    qat: QatTraining = Field(default=QatTraining(), description="quantization-aware fine-tuning")
    convert: Convert = Field(default=Convert(), description="interface of the flatbuffer")
    parity: Parity = Field(default=Parity(), description="bar for simulation against interpreter")
    evaluate: Evaluate = Field(default=Evaluate(), description="accuracy measurement")
    bench: Bench = Field(default=Bench(), description="latency measurement")
    report: Report = Field(default=Report(), description="conclusions of the report")

    @model_validator(mode="before")
    @classmethod
    def _bars_fit_engine(cls, values: Any) -> Any:
        # TFMOT's simulation follows no kernel's arithmetic; with the native bars no run would ever pass.
        if isinstance(values, dict) and values.get("engine") == "tfmot" and isinstance(values.get("parity", {}), dict):
            return {**values, "parity": TFMOT_BARS | values.get("parity", {})}
        return values

    @model_validator(mode="after")
    def _engine_takes_model_and_keys(self) -> "Recipe":
        if self.engine == "native":
            return self
        if self.model.name is not None and ":" not in self.model.name and self.model.weights is None:
            raise _conflict(
                "model.name",
                "a Keras 3 model, expected module:function that returns a tf_keras model, or weights with a whole "
                f"model for engine tfmot, received {_shown(self.model.name)}",
            )
        for key, only in (("distribute", "none"), ("precision", "float32")):
            if getattr(self, key) != only:
                raise _conflict(key, f"not for engine tfmot, expected {only}, received {getattr(self, key)}")
        defaults = type(self).model_fields
        for key in NATIVE_KEYS:
            section, name = key.split(".")
            value, default = getattr(getattr(self, section), name), getattr(defaults[section].default, name)
            if value != default:
                raise _conflict(
                    key,
                    f"has no use for engine tfmot, expected the default {_shown(default)}, received {_shown(value)}",
                )
        return self

    @model_validator(mode="after")
    def _interface_fits_scheme(self) -> "Recipe":
        fitting = ("int16",) if self.quantize.scheme.endswith("a16") else ("int8", "uint8")
        for key in ("input_type", "output_type"):
            value = getattr(self.convert, key)
            if value not in ("auto", "float32", *fitting):
                raise _conflict(
                    f"convert.{key}",
                    f"not a type of scheme {self.quantize.scheme}, expected auto, {', '.join(fitting)} or float32, "
                    f"received {value}",
                )
        return self

    @model_validator(mode="after")
    def _features_are_comparable(self) -> "Recipe":
        if self.qat.distillation_features and self.quantize.equalize:
            raise _conflict(
                "qat.distillation_features",
                "has no use beside quantize.equalize, which gives the channels of layers other ranges, expected []",
            )
        return self

    @model_validator(mode="after")
    def _something_to_start_from(self) -> "Recipe":
        # A module:function may return a trained model; a reference model starts with random weights.
        is_reference = self.model.name is not None and ":" not in self.model.name
        if is_reference and self.model.weights is None and self.float.epochs == 0:
            raise _conflict(
                "model.weights",
                "nothing to start from, expected weights or float.epochs of at least 1 for a reference "
                "model, received weights null and 0 epochs",
            )
        return self


# With engine tfmot: looser bars where the recipe sets none, and keys that TFMOT has nothing for.
TFMOT_BARS = {"min_top1_agreement": 0.95, "min_identical_output": 0.5}
NATIVE_KEYS = (
    *("quantize.scheme", "quantize.calibration", "quantize.input_range", "quantize.exclude"),
    *("qat.distillation", "qat.temperature", "qat.ema_decay", "qat.from_scratch"),
    *("qat.distillation_features", "qat.feature_weight", "qat.range_learning_rate"),
    *("quantize.layers", "quantize.narrow_storage", "quantize.weight_range"),
    *("quantize.learn_activation_ranges", "qat.start_after", "qat.estimator", "qat.damping"),
    *("qat.freeze_oscillations", "qat.reestimate_batch_norm"),
    *("quantize.equalize", "quantize.correct_bias", "quantize.adaround"),
    *("qat.freeze_observers_after", "qat.freeze_batch_norm_after"),
    *("parity.samples", "parity.min_identical_conv", "parity.min_identical_other", "parity.max_lsb"),
)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors (`recipes/recipe.schema.json`)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def recipe_keys() -> dict[str, str]:
    """Every key of a recipe as `section.key`, with what it means."""
    keys: dict[str, str] = {}
    for name, field in Recipe.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        inner = cast(type[BaseModel], field.annotation).model_fields if is_section else {}
        keys |= {f"{name}.{key}": row.description or "" for key, row in inner.items()}
        keys |= {} if is_section else {name: field.description or ""}
    return keys


# --- YAML ---------------------------------------------------------------------------------------------

MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 20
MAX_ALIASES = 32

_EXPONENT_FLOAT = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")
_SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_MAPPING_TAG = "tag:yaml.org,2002:map"
_SEQUENCE_TAG = "tag:yaml.org,2002:seq"


class _Loader(yaml.SafeLoader):
    """SafeLoader that bounds nesting and aliases. An alias repeats a scalar, so it cannot multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        self._aliases += is_alias
        self._depth += 1
        if self._aliases > MAX_ALIASES or self._depth > MAX_DEPTH:
            problem = f"more than {MAX_ALIASES} aliases or {MAX_DEPTH} levels of nesting"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            problem = "alias of a list or mapping; only a single value can be repeated"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would not read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


# PyYAML follows YAML 1.1, where `1e-3` is text. Everybody means the number.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+0123456789"))


def _compose(text: str) -> yaml.Node | None:
    """The root node of one YAML document; raises `yaml.YAMLError` or ValueError."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    return _Loader(text).get_single_node()


def _yaml_problem(error: Exception) -> str:
    """PyYAML's message without its excerpt of the file."""
    if isinstance(error, yaml.MarkedYAMLError):
        return ", ".join(part for part in (error.context, error.problem) if part)
    return str(error).partition("\n")[0]


def _yaml_error_line(error: Exception, text: str) -> int:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return error.problem_mark.line + 1
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position) + 1
    return 1


# --- values, where they came from, and what is wrong with them ---------------------------------------

KeyPath = tuple[str | int, ...]

# Only these are expanded: elsewhere a `$` means itself.
_ENVIRONMENT_REMEDIES = {
    ("data", "path"): "set it, or override with --set data.path=PATH",
    ("model", "weights"): (
        "set it to a folder that holds the file, or override with --set model.weights=PATH, or "
        "train from scratch with --set model.weights=null --set float.epochs=N"
    ),
}


@dataclass(frozen=True)
class _Place:
    """Where a value was written; `line` only sorts, overrides come last."""

    text: str
    line: int = sys.maxsize


class _Document:
    """The values of one recipe, the place of each, and the problems found so far (one per key)."""

    def __init__(self, text: str, file: str) -> None:
        """Read `text`; what cannot be read as a mapping at all is raised at once."""
        self._file = file
        self._constructor = _Loader("")
        self._places: dict[KeyPath, _Place] = {(): self._line(1)}
        self._problems: dict[KeyPath, tuple[_Place, str]] = {}
        self.values: dict[str, Any] = self._read_root(text)

    def override(self, text: str) -> None:
        """Apply one `key.path=value`; the value is YAML."""
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        place = _Place(f"--set {_short(text)}")
        if not (equals and all(path) and len(path) <= MAX_DEPTH):
            self._add((text,), f"not an override, expected key=value, received {_shown(text)}", place)
            return
        try:
            node = _compose(value)
        except (yaml.YAMLError, ValueError) as error:
            self._add(path, f"not valid YAML: {_yaml_problem(error)}", place)
            return
        section = self._open_section(path[:-1], place)
        if section is not None:
            self._places = {at: was for at, was in self._places.items() if at[: len(path)] != path}
            self._places[path] = place
            section[path[-1]] = None if node is None else self._read(node, path, lambda _: place)

    def expand_environment(self) -> None:
        """Replace `${VAR}` in the keys that hold paths."""
        for (section, key), remedy in _ENVIRONMENT_REMEDIES.items():
            values = self.values.get(section)
            if not (isinstance(values, dict) and isinstance(text := values.get(key), str)):
                continue
            variables = re.findall(r"\$\{(\w+)\}", text)
            unset = [f"${{{name}}}" for name in variables if not os.environ.get(name)]
            if unset:
                names = _short(", ".join(unset))
                problem = f"{names} is not set, expected a value: {remedy}, received {_shown(text)}"
                self._add((section, key), problem)
            else:
                values[key] = re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], text)

    def recipe(self) -> Recipe:
        """Validate; raises RecipeError with all problems."""
        recipe = None
        try:
            recipe = Recipe.model_validate(self.values)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                conflicting = details.get("ctx", {}).get("key")
                path = details["loc"] + tuple(conflicting.split(".") if conflicting else ())
                self._add(path, _describe(details))
        if recipe is None or self._problems:
            raise self._error()
        return recipe

    def _read_root(self, text: str) -> dict[str, Any]:
        try:
            node = _compose(text)
        except (yaml.YAMLError, ValueError) as error:
            place = self._line(_yaml_error_line(error, text))
            self._add((), f"not valid YAML: {_yaml_problem(error)}", place)
            raise self._error() from None
        values = {} if node is None else self._read(node, (), self._line_of)
        if not isinstance(values, dict):
            self._add((), f"wrong type, expected a mapping of keys to values, received {_shown(values)}")
            raise self._error()
        return values

    def _read(self, node: yaml.Node, path: KeyPath, place_of: Callable[[yaml.Node], _Place]) -> Any:
        """The value of a node; what is not text, number, boolean, null, list or mapping is a problem."""
        self._places.setdefault(path, place_of(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING_TAG:
            return self._read_mapping(node, path, place_of)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE_TAG:
            return [self._read(item, (*path, index), place_of) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALAR_TAGS:
            return self._read_scalar(node, path)
        tag = _short(node.tag.removeprefix("tag:yaml.org,2002:"))
        self._add(path, f"wrong type, expected text (quote it), a number, true, false or null, received {tag}")
        return None

    def _read_mapping(
        self, node: yaml.MappingNode, path: KeyPath, place_of: Callable[[yaml.Node], _Place]
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            # Text keys have their text as value, so this is the path of the value too.
            key_path = (*path, key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
            key = self._read(key_node, key_path, place_of)
            if not isinstance(key, str):
                self._add(key_path, f"key is not text, expected text (quote it), received {_shown(key)}")
                continue
            if key in values:
                first = self._places[key_path].text
                problem = f"duplicate key, expected each key once, received it first at {first}"
                self._add(key_path, problem, place_of(key_node))
            values[key] = self._read(value_node, key_path, place_of)
        return values

    def _read_scalar(self, node: yaml.ScalarNode, path: KeyPath) -> str | int | float | None:
        try:
            value = cast(str | int | float | None, self._constructor.construct_object(node))
            # Lone surrogates cannot be written to a file, nor can an integer of 4300 digits be printed.
            str(value).encode()
        except (yaml.YAMLError, ValueError, LookupError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            self._add(path, f"unreadable value, expected a YAML {kind}, received {_shown(node.value)}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._add(path, f"wrong value, expected a finite number, received {_short(node.value)}")
        return value

    def _open_section(self, path: Sequence[str], place: _Place) -> dict[str, Any] | None:
        """The mapping at `path`, made where nothing is; None and a problem where a value is."""
        section = self.values
        for depth, key in enumerate(path, 1):
            here = tuple(path[:depth])
            self._places.setdefault(here, place)
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                self._add(here, f"has no keys, expected a section, received {_shown(section)}", place)
                return None
        return section

    def _line_of(self, node: yaml.Node) -> _Place:
        return self._line(node.start_mark.line + 1)

    def _line(self, line: int) -> _Place:
        return _Place(f"{self._file}:{line}", line)

    def _add(self, path: KeyPath, problem: str, place: _Place | None = None) -> None:
        """Record a problem, at the place of the nearest key that was written down."""
        if place is None:
            place = next(self._places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self._places)
        self._problems.setdefault(path, (place, problem))

    def _error(self) -> RecipeError:
        found = sorted(self._problems.items(), key=lambda item: item[1][0].line)
        lines = []
        for path, (place, problem) in found:
            key = "".join(f"{_short(str(part))}." for part in path).removesuffix(".")
            lines.append(": ".join(part for part in (place.text, key, problem) if part))
        return RecipeError("\n".join(lines))


# --- wording ------------------------------------------------------------------------------------------


def _short(text: str) -> str:
    """`text` in one printable piece of at most 80 characters."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown(value: object) -> str:
    """A value as it would stand in YAML, on one line."""
    return _short(repr(value) if isinstance(value, str) else json.dumps(value))


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


def _section_at(path: KeyPath) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for key in path:
        section = cast(type[BaseModel], section.model_fields[str(key)].annotation)
    return section


def _describe(error: ErrorDetails) -> str:
    """What is wrong, what was expected and what was received, from one pydantic error."""
    kind, received = error["type"], _shown(error["input"])
    if kind == "conflict":
        return error["msg"]
    if kind in ("missing", "extra_forbidden"):
        fields, key = _section_at(error["loc"][:-1]).model_fields, str(error["loc"][-1])
        if kind == "missing":
            return f"missing, expected {fields[key].description}, received nothing"
        names, guess = ", ".join(fields), _did_you_mean(key, fields)
        return f"unknown key{guess}, expected one of {names}, received {_shown(key)}"
    if kind in ("model_type", "dict_type"):
        return f"wrong type, expected a mapping of keys to values, received {received}"
    expected = re.sub(r"^.*? should (be|have) ", "", error["msg"])
    is_bound = kind.startswith(("greater_than", "less_than"))
    wrong = "out of range" if is_bound else "wrong type" if kind.endswith("_type") else "wrong value"
    return f"{wrong}, expected {expected}, received {received}"


# --- files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecipeSummary:
    """One row of `mobileqat recipes`."""

    name: str
    path: Path
    description: str


def parse_recipe(text: str, *, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text.

    Args:
        text: the YAML document, at most 256 Ki characters.
        file: what error messages call it.
        overrides: `key.path=value` items that replace or add values; the value is YAML.

    Raises:
        RecipeError: listing every problem, each with its line or its override. What concerns two
            values is checked once both are valid by themselves.
    """
    document = _Document(text, file)
    for override in overrides:
        document.override(override)
    document.expand_environment()
    return document.recipe()


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or a shipped one by name (no folder, no `.yaml`).

    Example:
        load_recipe("digits_dscnn_w8a8", ["qat.epochs=2", "bench.threads=[1, 2]"])

    Raises:
        RecipeError: no such file or name, not UTF-8, or any problem that `parse_recipe` reports.
    """
    path, text = read_recipe(path_or_name)
    return parse_recipe(text, file=str(path), overrides=overrides)


def read_recipe(path_or_name: str | Path) -> tuple[Path, str]:
    """Where a recipe is, of a file or a shipped one by name, and its text as it stands there.

    Raises:
        RecipeError: no such file or name, or not UTF-8.
    """
    path = Path(path_or_name)
    if str(path_or_name) == path.name and path.suffix not in (".yaml", ".yml"):
        path = _recipes_folder() / f"{path.name}.yaml"
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)  # one more, so that parse_recipe sees a file too long
    except FileNotFoundError:
        names = [file.stem for file in _recipe_files()]
        raise RecipeError(
            f"{path_or_name}: no such recipe{_did_you_mean(path.stem, names)}, "
            f"expected a YAML file or one of {', '.join(names)}"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path_or_name}: not a text file, expected UTF-8: {error}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path_or_name}: cannot be read: {error}") from None
    return path, text


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `parse_recipe` reads it back as an equal one."""
    # Not `allow_unicode`: it writes U+0085 as it is, and reading takes that for the end of a line.
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, width=110)


def dump_value(value: Any) -> str:
    """One value on one line, quoted where a recipe would not read it back as it is."""
    return yaml.dump(value, Dumper=_Dumper, width=MAX_CHARACTERS).removesuffix("\n").removesuffix("\n...")


def list_recipes() -> list[RecipeSummary]:
    """The shipped recipes, by name. Descriptions only: nothing is validated, no variable is needed."""
    return [RecipeSummary(path.stem, path, _description(path)) for path in _recipe_files()]


def _description(path: Path) -> str:
    try:
        values = _Document(path.read_text(encoding="utf-8"), str(path)).values
    except (RecipeError, OSError, UnicodeDecodeError):
        values = {}
    return str(values.get("description", "(no description: not a valid recipe)"))


def _recipe_files() -> list[Path]:
    return sorted(_recipes_folder().glob("*.yaml"))


def _recipes_folder() -> Path:
    """`_recipes/` inside an installed package, `recipes/` beside the package in a source tree."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=2))
