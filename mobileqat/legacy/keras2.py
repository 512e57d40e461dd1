"""Importing a Keras 2 model file into Keras 3: `import_keras2`.

The model is rebuilt from the file's configuration and weights without Keras 2.  Where `tf_keras` is installed, both
models then answer the same random inputs in processes of their own, and their outputs are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np

from mobileqat.errors import LegacyUnavailableError, ModelError, ParityError
from mobileqat.legacy import files, process
from mobileqat.legacy.ranges import Ranges, read_ranges
from mobileqat.legacy.translate import translate
from mobileqat.rundir import write_whole

# One for each sample, so that neither data in 0..1 nor pixels saturate all of them.
MAGNITUDES = (0.01, 0.1, 1.0, 10.0)
# Sizes that a model leaves open, such as the length of a sequence.
OPEN_SIZE = 32
# Of the largest output: two implementations of one layer differ by the order of their float32 sums.
TOLERANCE = 1e-4
SMALLEST = 1e-6


@dataclass(frozen=True)
class Imported:
    """What an import made.

    Attributes:
        layers, weights: of the model, nested models included; an operator of TensorFlow's counts as a layer.
        largest_difference: between the outputs of both models, None where they were not compared.
        largest_output: magnitude of the largest output, for scale.
        not_compared: why the outputs were not compared.
        ranges: activation ranges of a model that TFMOT has quantized.
    """

    source: str
    target: str
    layers: int
    weights: int
    largest_difference: float | None
    largest_output: float | None
    not_compared: str | None
    ranges: Ranges | None

    def to_dict(self) -> dict:
        return asdict(self) | {"ranges": self.ranges.to_dict() if self.ranges else None}


def import_keras2(source: str | Path, target: str | Path) -> Imported:
    """Writes a Keras 2 model as a Keras 3 `.keras` file.

    Args:
        source: an `.h5` or `.keras` file, or a SavedModel folder, with a whole functional or sequential model as
            `tf_keras` or Keras up to 2.15 saved it.  Of a model that TFMOT annotated or quantized, the float model
            with the trained weights is imported.  How it was compiled, and its initializers, are left behind.
        target: the `.keras` file to write.

    Raises:
        UnsupportedModelError: layers, operators or options without an equivalent, all of them with what to do.
        ModelError: a file that is missing, broken or not Keras 2's, or weights that do not fit.
        ParityError: the outputs of both models differ; nothing is written.
        LegacyUnavailableError: a SavedModel, and no `tf_keras` to read it with.

    Example:
        >>> imported = import_keras2("old.h5", "new.keras")
        >>> imported.largest_difference
        1.1e-07
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".keras":
        raise ModelError(f"'{target}' must end in .keras, the format of Keras 3.")
    with _readable(source) as path:
        config = files.read_config(path)
        if files.is_keras_3(config):
            raise ModelError(f"'{source}' was saved by Keras 3 already. Use it as it is.")
        translation = translate(config, str(source))
        files.load_weights(path, translation)
        model = translation.model
        has_wrappers = files.holds_wrappers(config)
        ranges = read_ranges(path, config) if files.is_quantized(config) else None
        inputs, outputs, reason = _answers(model, source, has_wrappers)

    def save(temporary: Path) -> tuple[float | None, float | None]:
        model.save(temporary)
        # What is compared is what was written.
        written = keras.models.load_model(temporary, compile=False, safe_mode=True)
        return _difference(written, inputs, outputs, source) if reason is None else (None, None)

    compared: list[float | None] = []
    write_whole(target, lambda temporary: compared.extend(save(temporary)))
    difference, largest = compared
    return Imported(
        str(source),
        str(target),
        sum(len(parts) for parts in translation.parts.values()),
        len(model.weights),
        difference,
        largest,
        reason,
        ranges,
    )


@contextmanager
def _readable(source: Path) -> Iterator[Path]:
    """The source as a file that can be read without Keras 2."""
    if source.is_dir():
        # SavedModels keep what is needed in formats of TensorFlow's own.
        if not (source / "saved_model.pb").is_file():
            raise ModelError(f"'{source}' is a folder, but no SavedModel: it has no saved_model.pb.")
        needs_tf_keras = True
    elif not source.is_file():
        raise ModelError(f"There is no file '{source}'. Expected an .h5 or .keras file, or a SavedModel folder.")
    elif source.suffix not in (".h5", ".hdf5", ".keras"):
        raise ModelError(f"'{source}' is not an .h5 or .keras file.")
    else:
        config = files.read_config(source)
        if source.suffix == ".keras" and files.is_quantized(config):
            raise ModelError(
                f"'{source}' holds a model that TFMOT has quantized, which not even TFMOT can load from a .keras file. "
                "Save it as an .h5 file or a SavedModel."
            )
        needs_tf_keras = source.suffix == ".keras" and files.holds_wrappers(config)
        if needs_tf_keras:
            translate(config, str(source))  # what is refused is refused before tf_keras sees the file
    if not needs_tf_keras:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="mobileqat-") as folder:
        path = Path(folder) / "model.h5"
        process.call("to_h5", {"source": str(source), "target": str(path)})
        yield path


def _answers(
    model: keras.Model, source: Path, has_wrappers: bool
) -> tuple[list[np.ndarray], list[np.ndarray], str | None]:
    """Random inputs for a model, the old one's outputs, and why there are none if there are none."""
    if any(tensor.dtype == "string" for tensor in model.inputs):
        return [], [], "the model takes text, for which there are no random inputs"
    inputs = {f"{index:03}": _random(tensor, index) for index, tensor in enumerate(model.inputs)}
    sources = {"old": str(source.resolve())}
    try:
        _, outputs = process.call("predict", {"sources": sources, "unwrap": has_wrappers}, arrays=inputs)
    except (LegacyUnavailableError, ModelError) as error:
        # Not installed, or not able to load what was rebuilt without it: no reason to withhold the model.
        return [], [], str(error)
    return list(inputs.values()), list(outputs.values()), None


def _difference(
    model: keras.Model, inputs: list[np.ndarray], expected: list[np.ndarray], source: Path
) -> tuple[float, float]:
    """The largest difference of a model's outputs to what is expected, and the largest of these."""
    # A sequential model has one input, a functional one any structure of them.
    given = inputs[0] if isinstance(model, keras.Sequential) else keras.tree.pack_sequence_as(model.input, inputs)
    received = keras.tree.flatten(model.predict(given, verbose=0))
    if [array.shape for array in received] != [array.shape for array in expected]:
        raise ParityError(
            f"The outputs of '{source}' have shapes {[array.shape for array in expected]} in tf_keras and "
            f"{[array.shape for array in received]} in Keras 3. Nothing was written."
        )
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(received, expected, strict=True)]
    difference = max(float(np.max(np.abs(a - b), initial=0)) for a, b in pairs)
    largest = max(float(np.max(np.abs(b), initial=0)) for _, b in pairs)
    if not difference <= TOLERANCE * largest + SMALLEST:
        raise ParityError(
            f"The outputs of '{source}' in tf_keras and in Keras 3 differ by {difference:.3g}, of a largest output of "
            f"{largest:.3g}; expected at most {TOLERANCE:g} of it. Nothing was written."
        )
    return difference, largest


def _random(tensor: keras.KerasTensor, seed: int) -> np.ndarray:
    """Random samples for an input; whole numbers are 0 or 1, which any vocabulary has."""
    random = np.random.default_rng(seed)
    shape = (tensor.shape[0] or len(MAGNITUDES), *(OPEN_SIZE if size is None else size for size in tensor.shape[1:]))
    if "int" in tensor.dtype or tensor.dtype == "bool":
        return random.integers(0, 2, shape).astype(tensor.dtype)
    magnitudes = np.resize(MAGNITUDES, len(inputs := random.normal(size=shape)))
    return (inputs * magnitudes.reshape(-1, *[1] * (inputs.ndim - 1))).astype("float32")
