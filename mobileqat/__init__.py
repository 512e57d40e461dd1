"""mobileqat: quantization-aware training from Keras 3 to verified integer LiteRT (TensorFlow Lite) files.

    import mobileqat as mq
    q = mq.quantize_model(model)
    mq.calibrate(q, data)
    q.compile(...); q.fit(...)
    flatbuffer = mq.convert(q)

Names are imported when they are first used, so that the import itself stays light.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

_MODULES = {
    "FakeQuantize": "fakequant",
    "MobileQatError": "errors",
    "Metadata": "metadata",
    "QuantizeWrapper": "wrappers",
    "QuantizedModel": "quantize",
    "adaround": "adaround",
    "add_metadata": "metadata",
    "analyze": "analyze",
    "calibrate": "calibrate",
    "convert": "convert",
    "convert_float": "convert",
    "correct_bias": "bias_correction",
    "equalize": "equalize",
    "import_keras2": "legacy.keras2",
    "inspect": "flatbuffer",
    "load_model": "models",
    "load_ranges": "legacy.ranges",
    "quantize_annotate_layer": "quantize",
    "quantize_annotate_model": "quantize",
    "quantize_apply": "quantize",
    "quantize_model": "quantize",
    "read_metadata": "metadata",
    "register_rule": "lowering",
    "resize": "quantize",
    "set_ranges": "legacy.ranges",
    "strip": "quantize",
    "verify": "parity",
}
__all__ = sorted(_MODULES)


class _Package(types.ModuleType):
    """The module's type: importing the submodule `convert` must not hide the function `convert`."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_namesake = isinstance(value, types.ModuleType) and _MODULES.get(name) == name
        super().__setattr__(name, getattr(value, name) if is_namesake else value)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mobileqat' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mobileqat.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package

# Where Keras is loaded already, a light import gains nothing, and `keras.models.load_model` needs our classes.
if "keras" in sys.modules:
    importlib.import_module("mobileqat.quantize")
