"""A recipe of one's own: a few answers as a commented YAML file.

Comments are the schema's own descriptions, and the text is read back before it is written, so that what this makes is
a valid recipe by construction.
"""

from __future__ import annotations

import json
import re
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

from mobileqat.errors import RecipeError
from mobileqat.recipe import (
    MODELS,
    SOURCES,
    PathlessSource,
    Recipe,
    ReferenceModel,
    SchemeName,
    dump_value,
    parse_recipe,
)

LINE = 100
RESIZING = ("image_folder", "trashnet")  # sources that take an image size
MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")
_LARGEST_CONFIG = 64 * 2**20  # bytes; more is no model's configuration

# What a reader may want next, as comments with their defaults.
_SUGGESTED = {
    "data": ("validation_fraction", "calibration_samples"),
    "float": ("batch_size", "learning_rate"),
    "quantize": ("calibration", "exclude"),
    "qat": ("batch_size", "learning_rate", "distillation"),
    "convert": ("input_type", "output_type"),
    "bench": ("targets",),
}


@dataclass(frozen=True)
class Answers:
    """What decides a recipe.

    Args:
        source: a recipe's `data.source`.
        path: its file or folder, for the sources that read one.
        image_size: (height, width) in pixels; None keeps the source's.
        model: a reference model, `module:function`, or the path of a Keras file.
        scheme: bits of weights and activations.
        float_epochs: of training before quantization; 0 for a model that is trained already.
        qat_epochs: of fine-tuning; 0 stops at PTQ.
        channels: of the images, where the model's file says that they are not RGB.
    """

    source: str
    path: str | None
    image_size: tuple[int, int] | None
    model: str
    scheme: str
    float_epochs: int
    qat_epochs: int
    channels: int | None = None

    @property
    def is_file(self) -> bool:
        """Whether the model is a file."""
        return is_model_file(self.model)

    @property
    def name(self) -> str:
        """A recipe's name: what data, what model, how many bits."""
        data = Path(self.path).stem if self.path else self.source.partition(":")[2] or self.source
        model = Path(self.model).stem if self.is_file else self.model.partition(":")[2] or self.model
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{data}_{model}_{self.scheme}").strip("_.-") or "recipe"


def is_model_file(model: str) -> bool:
    """Whether the answer names a Keras file."""
    return model.endswith(MODEL_SUFFIXES)


def image_input(model: str) -> tuple[int | None, int | None, int] | None:
    """(height, width, channels) that a `.keras` file's only input has, read without Keras; None where none is found."""
    try:
        with zipfile.ZipFile(model) as archive, archive.open("config.json") as file:
            config = json.loads(file.read(_LARGEST_CONFIG))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    layers = (config.get("config") or {}).get("layers") or [] if isinstance(config, dict) else []
    shapes = [layer["config"].get("batch_shape") for layer in layers if layer.get("class_name") == "InputLayer"]
    if len(shapes) != 1 or not isinstance(shapes[0], list) or len(shapes[0]) != 4:
        return None
    return tuple(shapes[0][1:])


def recognize_source(answer: str) -> tuple[str, str | None]:
    """`data.source` and `data.path` of a folder, an npz file, or a source's name.

    Raises:
        RecipeError: it is none of them.
    """
    if ":" in answer or answer in get_args(PathlessSource):
        return answer, None
    path = Path(answer)
    if path.is_dir():
        return "image_folder", answer
    if path.suffix == ".npz":
        if not path.is_file():
            raise RecipeError(
                f"There is no file '{answer}'. Expected an .npz file with x_train, y_train, x_test, y_test."
            )
        return "npz", answer
    raise RecipeError(f"'{answer}' is neither a folder nor an .npz file. Expected one of these, or {SOURCES}.")


def check_model(answer: str) -> str:
    """The answer, if a recipe takes it.

    Raises:
        RecipeError: it is no reference model, no `module:function` and no file.
    """
    if is_model_file(answer):
        if not Path(answer).is_file():
            raise RecipeError(f"There is no file '{answer}'. Expected a .keras or .h5 file with a whole model.")
    elif ":" not in answer and answer not in get_args(ReferenceModel):
        raise RecipeError(f"'{answer}' is no model. Expected {MODELS}, or a .keras or .h5 file.")
    return answer


def read_image_size(answer: str) -> tuple[int, int] | None:
    """(height, width) from "96 96" or "96x96"; None from "keep".

    Raises:
        RecipeError: anything else.
    """
    if answer == "keep":
        return None
    if not (match := re.fullmatch(r"([1-9][0-9]{0,4})[ x,]+([1-9][0-9]{0,4})", answer.strip())):
        raise RecipeError(f"'{answer}' is no size. Expected height and width in pixels, such as 96 96, or keep.")
    return int(match[1]), int(match[2])


def read_scheme(answer: str) -> str:
    """A scheme's name, or RecipeError."""
    if answer not in get_args(SchemeName):
        raise RecipeError(f"'{answer}' is no scheme. Expected one of {', '.join(get_args(SchemeName))}.")
    return answer


def read_epochs(answer: str) -> int:
    """A number of epochs, or RecipeError."""
    if not re.fullmatch(r"[0-9]{1,6}", answer):
        raise RecipeError(f"'{answer}' is no number of epochs. Expected 0 or more.")
    return int(answer)


T = TypeVar("T")


class Ask(Protocol):
    """Gets an answer: `option` as it was given, else what a person says to `question`, else `default`.

    `read` checks and converts it, and raises RecipeError; a person is then asked again.
    """

    def __call__(self, option: str, question: str, read: Callable[[str], T], default: str | None) -> T: ...


def collect(ask: Ask, data_path: str | None = None) -> Answers:
    """Asks what decides a recipe.

    Args:
        ask: see `Ask`.
        data_path: if the source is named and reads a file or folder.

    Raises:
        RecipeError: an answer that is not one.
    """

    def read_source(answer: str) -> tuple[str, str | None]:
        return (answer, data_path) if data_path is not None else recognize_source(answer)

    source, path = ask(
        "--data", "Data: a folder of images, an .npz file, a source or module:function", read_source, None
    )
    model = ask(
        "--model", "Model: a reference model, module:function, or a .keras or .h5 file", check_model, "mobilenet_v2"
    )
    image_size = channels = None
    if source in RESIZING:
        height, width, found = (image_input(model) if is_model_file(model) else None) or (None, None, 3)
        channels = 1 if source == "image_folder" and found == 1 else None
        question = "Resize images to height and width in pixels (keep: they are all of one size)"
        image_size = ask("--image-size", question, read_image_size, f"{height or 96} {width or 96}")
    scheme = ask("--scheme", "Scheme: bits of weights (w) and activations (a)", read_scheme, "w8a8")
    is_reference = model in get_args(ReferenceModel)
    question = "Epochs of float training" if is_reference else "Epochs of float training (0: it is trained)"
    float_epochs = ask("--float-epochs", question, read_epochs, "20" if is_reference else "0")
    qat_epochs = ask("--qat-epochs", "Epochs of quantization-aware fine-tuning (0: only PTQ)", read_epochs, "5")
    return Answers(source, path, image_size, model, scheme, float_epochs, qat_epochs, channels)


def write_recipe(answers: Answers, file: str) -> str:
    """The recipe as YAML with comments.

    Args:
        answers: see `Answers`.
        file: what the comments and error messages call it.

    Raises:
        RecipeError: the answers do not make a recipe; all problems at once.
    """
    text = "\n".join([*_head(answers, file), *_body(answers)]) + "\n"
    parse_recipe(text, file=file)
    return text


def _head(answers: Answers, file: str) -> Iterator[str]:
    yield f"# Run it:                         mobileqat train {file}"
    yield f"# See every key and its default:  mobileqat recipes show {file} --full"
    yield f"name: {dump_value(answers.name)}"
    data, model = answers.path or answers.source, answers.model
    yield f"description: {dump_value(f'{model} on {data} in {answers.scheme}')}"


def _body(answers: Answers) -> Iterator[str]:
    data: dict[str, Any] = {"source": answers.source}
    if answers.path is not None:
        data["path"] = answers.path
    if answers.image_size is not None:
        data["image_size"] = list(answers.image_size)
    if answers.channels is not None:
        data["options"] = {"channels": answers.channels}
    yield from _section("data", data)
    yield from _section("model", {"weights": answers.model} if answers.is_file else {"name": answers.model})
    if ":" in answers.model and not answers.is_file:
        yield "  # The function returns a Keras 3 model; it is given input_shape and classes if it has such parameters."
    yield from _section("float", {"epochs": answers.float_epochs})
    yield from _section("quantize", {"scheme": answers.scheme})
    qat = {"epochs": answers.qat_epochs} if answers.qat_epochs else {"enabled": False}
    yield from _section("qat", qat)
    yield from _section("convert", {})
    yield from _section("bench", {})


def _section(name: str, values: dict[str, Any]) -> Iterator[str]:
    section: Any = Recipe.model_fields[name].annotation
    fields = section.model_fields
    yield f"\n# {section.__doc__}"
    yield f"{name}:" if values else f"# {name}:"
    for key, value in values.items():
        yield from _line(f"{key}: {_flow(value)}", fields[key].description)
    for key in _SUGGESTED.get(name, ()):
        default = fields[key].default
        yield from _line(
            f"# {key}: {_flow(list(default) if isinstance(default, tuple) else default)}", fields[key].description
        )


def _line(text: str, meaning: str) -> Iterator[str]:
    if len(text) + len(meaning) > LINE:
        yield from textwrap.wrap(meaning, LINE, initial_indent="  # ", subsequent_indent="  # ")
        yield f"  {text}"
    else:
        yield f"  {text}  # {meaning}"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {dump_value(each)}' for key, each in value.items())}}}"
    return f"[{', '.join(map(dump_value, value))}]" if isinstance(value, list) else dump_value(value)
