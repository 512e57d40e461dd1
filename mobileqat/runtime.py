"""One interface over the TensorFlow Lite interpreters: LiteRT, tflite-runtime and tf.lite.

`RUNTIMES` is the table of what exists, `available_runtimes` says what is installed, and a `Session` runs one
model. Every file passes `flatbuffer.read` before native code sees it. Real values enter a quantized input as
`clip(round(x / scale) + zero_point)`, ties away from zero, and leave as `scale * (q - zero_point)`.
"""

import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobileqat import flatbuffer, numerics
from mobileqat.errors import DataError, MobileQatError, RuntimeUnavailableError
from mobileqat.flatbuffer import TensorDetails
from mobileqat.progress import task

Arrays = np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Runtime:
    """Where an interpreter comes from.

    Attributes:
        package: the distribution to install.
        module: the module that has `Interpreter`.
        kernels: what computes, in words.
        resolver: the name in `OpResolverType` that selects them, None for the interpreter's default.
        numpy_major_below: the compiled module needs a NumPy older than this major version.
    """

    package: str
    module: str
    kernels: str
    resolver: str | None = None
    numpy_major_below: int | None = None


RUNTIMES: dict[str, Runtime] = {
    "litert": Runtime("ai-edge-litert", "ai_edge_litert.interpreter", "XNNPACK, what phones run by default"),
    "litert-builtin": Runtime(
        "ai-edge-litert",
        "ai_edge_litert.interpreter",
        "optimized kernels without delegates",
        "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
    ),
    "litert-reference": Runtime(
        "ai-edge-litert", "ai_edge_litert.interpreter", "reference kernels, slow", "BUILTIN_REF"
    ),
    "tflite-runtime": Runtime(
        "tflite-runtime",
        "tflite_runtime.interpreter",
        "XNNPACK for float, ruy kernels for int8",
        numpy_major_below=2,
    ),
    "tf-lite": Runtime("tensorflow", "tensorflow.lite.python.interpreter", "XNNPACK, inside TensorFlow"),
}


def available_runtimes() -> dict[str, str]:
    """For every runtime its version, or the reason why it cannot be used; nothing heavy is imported.

    A usable runtime is one whose value starts with a digit; the reasons start with "not".
    """
    return {name: _version(runtime) or f"not usable: {_refusal(runtime)}" for name, runtime in RUNTIMES.items()}


def resolve_default() -> str:
    """The first usable runtime in the order of `RUNTIMES`.

    Raises:
        RuntimeUnavailableError: none is installed; the message says why for each.
    """
    for name, runtime in RUNTIMES.items():
        if _version(runtime):
            return name
    reasons = "; ".join(f"{name}: {_refusal(runtime)}" for name, runtime in RUNTIMES.items())
    raise RuntimeUnavailableError(f"no interpreter is installed ({reasons})")


def _version(runtime: Runtime) -> str | None:
    return None if _refusal(runtime) else importlib.metadata.version(runtime.package)


def _refusal(runtime: Runtime) -> str | None:
    try:
        importlib.metadata.version(runtime.package)
    except importlib.metadata.PackageNotFoundError:
        return f"install the package {runtime.package}"
    # Importing such a module under a newer NumPy prints a page of warnings and may crash.
    if runtime.numpy_major_below and int(np.__version__.split(".")[0]) >= runtime.numpy_major_below:
        return f"{runtime.package} needs NumPy < {runtime.numpy_major_below}, found {np.__version__}"
    return None


class Session:
    """One model, ready to run in one interpreter.

    Args:
        model: path or bytes of a `.tflite` file, or what `flatbuffer.read` made of one.
        runtime: a key of `RUNTIMES`.
        threads: interpreter threads, at least 1.
        batch_size: samples per invocation. Default: the file's own static batch. A larger one resizes the
            inputs, which only some graphs survive (a reshape may have the batch as a constant): it is kept
            only if it gives the outputs of the file's own batch, otherwise `batch_size` falls back to that.

    Attributes:
        model: the checked `flatbuffer.Model`.
        inputs, outputs: a `TensorDetails` each, shapes with the batch in effect.
        batch_size: the batch in effect.

    Raises:
        FlatbufferError: the file is broken.
        RuntimeUnavailableError: the runtime is not installed, or refuses the file.

    Example:
        >>> session = Session(Path("model.tflite"))
        >>> session.dequantize(session.predict(images))  # float32 [n, classes]
    """

    def __init__(
        self,
        model: bytes | str | Path | flatbuffer.Model,
        runtime: str = "litert",
        threads: int = 1,
        batch_size: int | None = None,
    ) -> None:
        if threads < 1 or (batch_size is not None and batch_size < 1):
            raise MobileQatError(
                f"threads and batch_size start at 1. Received: threads={threads}, batch_size={batch_size}"
            )
        self.model = model if isinstance(model, flatbuffer.Model) else flatbuffer.read(model)
        self.runtime = runtime
        self.threads = threads
        self._has_state = any(tensor.is_variable for tensor in self.model.tensors)
        self._open()
        if batch_size is not None and batch_size != self.batch_size:
            self._try_batch(batch_size)

    def run(self, *arrays: np.ndarray | Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Runs the model once on raw arrays.

        Args:
            arrays: one array per input, in order, or one dict by tensor or signature name. Dtypes and shapes
                must be those of `inputs`; nothing is quantized or cast.

        Returns:
            A copy of every output, raw, in the order of `outputs`. A model with state starts from zero.

        Raises:
            DataError: an array of another number, shape or dtype.
            RuntimeUnavailableError: the interpreter fails.
        """
        given = arrays[0] if len(arrays) == 1 and isinstance(arrays[0], Mapping) else arrays
        return self._run(self._in_order(given))

    def set_inputs(self, *arrays: np.ndarray) -> None:
        """Copies raw arrays into the inputs, for `invoke`; the arguments are those of `run`."""
        for details, index, array in zip(self.inputs, self._input_indices, self._in_order(arrays), strict=True):
            if array.dtype != details.dtype or array.shape != details.shape:
                raise DataError(
                    f"input '{details.name}' takes {details.dtype} {details.shape}. "
                    f"Received: {array.dtype} {array.shape}"
                )
            self._interpreter.set_tensor(index, array)

    def invoke(self) -> None:
        """Computes on whatever the inputs hold: the part of `run` that a benchmark times."""
        try:
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise RuntimeUnavailableError(f"{self.runtime} fails at run time: {_brief(error)}") from error

    def predict(self, x: Arrays, *, quantize: bool = True) -> np.ndarray | list[np.ndarray]:
        """Runs n samples, in batches of `batch_size`.

        Args:
            x: [n, ...] for a model with one input, else a sequence in order or a dict by name. Floating point
                values are real values: a quantized input gets them quantized with its own scale and zero
                point, rounded half away from zero as TensorFlow Lite's QUANTIZE does, and clipped. Integers
                of the input's dtype are taken as they are.
            quantize: False takes raw values only.

        Returns:
            Raw outputs stacked over n: one array [n, ...], or a list of them for several outputs. A model
            with state starts every invocation from zero.

        Raises:
            DataError: samples of another shape or dtype, or NaN.
            RuntimeUnavailableError: the interpreter fails.
        """
        pairs = zip(self._in_order(x), self.inputs, strict=True)
        arrays = [to_raw(array, details, quantize) for array, details in pairs]
        count = len(arrays[0])
        if any(len(array) != count for array in arrays):
            raise DataError(f"inputs have different numbers of samples: {[len(array) for array in arrays]}")
        batches = list(self._batches(arrays, count))
        outputs = [np.concatenate(parts)[:count] for parts in zip(*batches, strict=True)]
        outputs = outputs or [np.empty((0, *row.shape[1:]), row.dtype) for row in self.outputs]
        return outputs[0] if len(outputs) == 1 else outputs

    def dequantize(self, outputs: np.ndarray | Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
        """Raw outputs as real values, float32; outputs without a scale come back unchanged."""
        if isinstance(outputs, np.ndarray):
            return _dequantize(outputs, self.outputs[0])
        return [_dequantize(array, details) for array, details in zip(outputs, self.outputs, strict=True)]

    def _open(self, batch_size: int | None = None) -> None:
        """Builds the interpreter, with the inputs' first dimension resized if asked for."""
        try:
            self._interpreter = _interpreter(self.runtime, self.model.content, self.threads)
            if batch_size is not None:
                for row in self._interpreter.get_input_details():
                    shape = [batch_size, *row["shape"].tolist()[1:]]
                    self._interpreter.resize_tensor_input(row["index"], shape)
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError, TypeError) as error:
            raise RuntimeUnavailableError(f"{self.runtime} refuses the model: {_brief(error)}") from error
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._input_indices = [row["index"] for row in inputs]
        self._output_indices = [row["index"] for row in outputs]
        self.inputs = tuple(_details(row) for row in inputs)
        self.outputs = tuple(_details(row) for row in outputs)
        self.batch_size = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else 1

    def _try_batch(self, batch_size: int) -> None:
        """Resizes to `batch_size`, and back if the outputs of a few random samples change."""
        if self._has_state or any(row.shape[:1] != (self.batch_size,) for row in self.inputs):
            return
        probes = [random_samples(row, max(batch_size, self.batch_size)) for row in self.inputs]
        expected = self.predict(probes, quantize=False)
        try:
            self._open(batch_size)
            if any(row.shape[:1] != (batch_size,) for row in self.outputs):
                raise RuntimeUnavailableError("the outputs have no batch of that size")
            if not _equal(self.predict(probes, quantize=False), expected):
                raise RuntimeUnavailableError("the outputs depend on the batch")
        except (RuntimeUnavailableError, ValueError):
            self._open()

    def _in_order(self, x: Any) -> list[np.ndarray]:
        """One array per input from an array, a sequence, or a dict by tensor or signature name."""
        names = [row.name for row in self.inputs]
        if isinstance(x, Mapping):
            aliases = self._signature_names()
            by_name = {aliases.get(name, name): array for name, array in x.items()}
            if set(by_name) != set(names):
                raise DataError(f"the model's inputs are {names}. Received: {list(x)}")
            x = [by_name[name] for name in names]
        arrays = [x] if isinstance(x, np.ndarray) else [np.asarray(array) for array in x]
        if len(arrays) != len(names):
            raise DataError(f"the model takes {len(names)} inputs {names}. Received: {len(arrays)} arrays")
        return arrays

    def _signature_names(self) -> dict[str, str]:
        tensors = self.model.tensors
        pairs = [pair for entry in self.model.signatures.values() for pair in entry["inputs"].items()]
        return {name: tensors[index].name for name, index in pairs if index in self.model.inputs}

    def _batches(self, arrays: list[np.ndarray], count: int) -> Iterator[list[np.ndarray]]:
        with task(f"{self.runtime} interpreter", count, "samples") as advance:
            for start in range(0, count, self.batch_size):
                chunk = [array[start : start + self.batch_size] for array in arrays]
                missing = self.batch_size - len(chunk[0])
                if missing:  # the last batch is filled up by repeating its last sample
                    chunk = [np.concatenate((part, np.repeat(part[-1:], missing, axis=0))) for part in chunk]
                yield [self._with_batch(array) for array in self._run(chunk)]
                advance(self.batch_size - missing)

    def _with_batch(self, output: np.ndarray) -> np.ndarray:
        """An output of a single-sample model that lacks the batch dimension gets one."""
        if output.shape[:1] == (self.batch_size,):
            return output
        if self.batch_size == 1:
            return output[None]
        raise DataError(f"an output of shape {output.shape} is no batch of {self.batch_size}: use run()")

    def _run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if self._has_state:  # a converted LSTM would go on from where the last invocation ended
            self._interpreter.reset_all_variables()
        self.set_inputs(*arrays)
        self.invoke()
        return [self._interpreter.get_tensor(index) for index in self._output_indices]


def require_runtime(name: str) -> str:
    """The version of a runtime; nothing heavy is imported.

    Raises:
        RuntimeUnavailableError: no such runtime, or it is not usable here.
    """
    if name not in RUNTIMES:
        raise RuntimeUnavailableError(f"there is no runtime '{name}', expected one of {list(RUNTIMES)}")
    refusal = _refusal(RUNTIMES[name])
    if refusal:
        raise RuntimeUnavailableError(f"{name} cannot be used: {refusal}")
    return importlib.metadata.version(RUNTIMES[name].package)


def import_runtime(name: str) -> Any:
    """The module of a runtime, imported.

    Raises:
        RuntimeUnavailableError: no such runtime, or it is not usable here.
    """
    require_runtime(name)
    try:
        return importlib.import_module(RUNTIMES[name].module)
    except ImportError as error:
        raise RuntimeUnavailableError(f"{name} cannot be imported: {error}") from error


def random_samples(details: TensorDetails, count: int | None = None, whole: bool = False) -> np.ndarray:
    """Raw values that fit an input, the same in every call: [count, ...], by default the input's own shape.

    With `whole`, the count stands before the whole shape, batch included: [count, batch, ...].

    Small integers cover their whole range and floats [0, 1). Everything else is zero: it may be an index.
    """
    shape = details.shape if count is None else (count, *details.shape[0 if whole else 1 :])
    generator = np.random.default_rng(0)
    if details.dtype in ("int8", "uint8", "int16"):
        bounds = np.iinfo(details.dtype)
        return generator.integers(bounds.min, bounds.max, shape, details.dtype, endpoint=True)
    if np.issubdtype(details.dtype, np.floating):
        return generator.random(shape).astype(details.dtype)
    return np.zeros(shape, details.dtype)


def _interpreter(name: str, content: bytes, threads: int) -> Any:
    module = import_runtime(name)
    options: dict[str, Any] = {"model_content": content, "num_threads": threads}
    resolver = RUNTIMES[name].resolver
    if resolver:
        options["experimental_op_resolver_type"] = module.OpResolverType[resolver]
    with warnings.catch_warnings():
        # TensorFlow announces on every construction that LiteRT replaces its interpreter.
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf\.lite\.Interpreter is deprecated")
        return module.Interpreter(**options)


def _details(row: Mapping[str, Any]) -> TensorDetails:
    scales = row["quantization_parameters"]["scales"]
    zero_points = row["quantization_parameters"]["zero_points"]
    is_quantized = len(scales) == 1
    return TensorDetails(
        row["name"],
        tuple(row["shape"].tolist()),
        np.dtype(row["dtype"]).name,
        float(scales[0]) if is_quantized else None,
        int(zero_points[0]) if is_quantized else None,
    )


def to_raw(array: np.ndarray, details: TensorDetails, quantize: bool) -> np.ndarray:
    """Samples [n, ...] as raw values of an input.

    Args:
        array: [n, ...], of the input's dtype (taken as it is) or real values.
        details: the input.
        quantize: whether real values may be quantized: with the input's grid, half away from zero, clipped.

    Raises:
        DataError: another shape or dtype, an input without a scale, or NaN.
    """
    where = f"input '{details.name}'"
    if not details.shape or array.shape[1:] != details.shape[1:] or not array.ndim:
        hint = ""
        if len(details.shape) == array.ndim == 4:
            _, height, width, channels = details.shape
            hint = f". An image folder is read so with --image-size {height} {width} --data-option channels={channels}"
        raise DataError(f"{where} takes samples of shape {details.shape[1:]}. Received: {array.shape}{hint}")
    if array.dtype == details.dtype:
        return array
    if not quantize or not np.issubdtype(array.dtype, np.floating):
        expected = f"{details.dtype} or real values" if quantize else details.dtype
        raise DataError(f"{where} takes {expected}. Received: {array.dtype}")
    if np.issubdtype(details.dtype, np.floating):
        return array.astype(details.dtype)
    if details.scale is None or details.zero_point is None:
        raise DataError(f"{where} takes {details.dtype} and has no scale. Received: {array.dtype}")
    if np.isnan(array).any():
        raise DataError(f"{where} received NaN")
    return _quantize(array, details.scale, details.zero_point, details.dtype)


def _quantize(x: np.ndarray, scale: float, zero_point: int, dtype: str) -> np.ndarray:
    bounds = np.iinfo(dtype)
    return numerics.quantize_between(x, scale, zero_point, int(bounds.min), int(bounds.max)).astype(dtype)


def _dequantize(array: np.ndarray, details: TensorDetails) -> np.ndarray:
    if details.scale is None or details.zero_point is None:
        return array
    return numerics.dequantize(array, details.scale, details.zero_point)


def _brief(error: Exception, limit: int = 300) -> str:
    # Interpreters join one sentence per tensor.
    text = str(error)
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _equal(first: Any, second: Any) -> bool:
    """Integers equal; floats close, since the order of summation may depend on the batch."""
    pairs = [(first, second)] if isinstance(first, np.ndarray) else list(zip(first, second, strict=True))
    return all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-5 if a.dtype.kind == "f" else 0) for a, b in pairs
    )
