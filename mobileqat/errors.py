"""Every error a user can cause or meet, and the exit code that the command line gives for it.

    MobileQatError                 exit 2: the request cannot be carried out as asked
    ├── RecipeError                a recipe file: unknown key, wrong type, impossible combination
    ├── DataError                  a dataset: missing, wrong shape or dtype, NaN, labels out of range
    ├── ModelError                 a Keras model or weights file: missing, truncated, NaN weights
    │   └── UnsupportedModelError  layers without a rule; lists all of them at once
    ├── FlatbufferError            a .tflite file: missing, truncated, not a flatbuffer
    ├── RuntimeUnavailableError    an interpreter that is not installed or cannot run the file
    ├── DeviceError                a target: not there, gone in mid-run, too slow, or it cannot run the file
    ├── LegacyUnavailableError     tf_keras or TFMOT is not installed
    ├── CalibrationError           activation ranges missing, collapsed or not finite
    ├── RunDirectoryError          a run directory: locked, from another recipe, not writable
    ├── ClusterError               a training on several machines: set up wrongly, or a worker was lost
    └── CheckFailed                exit 1: the request was carried out and a check did not pass
        ├── TrainingError          a loss or weight became NaN or infinite
        ├── InspectionError        a file that should be fully integer is not
        ├── DelegationError        a delegate took fewer operators than asked for
        └── ParityError            simulation and interpreter disagree beyond the bar

A message says what is wrong, where, what was expected, what came, and what to do about it.
"""

from typing import Any


class MobileQatError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 2


class RecipeError(MobileQatError):
    """A recipe does not describe a run."""


class DataError(MobileQatError):
    """A dataset cannot be used."""


class ModelError(MobileQatError):
    """A Keras model or a weights file cannot be used."""


class UnsupportedModelError(ModelError):
    """A model holds layers that no rule covers; the message lists all of them."""


class FlatbufferError(MobileQatError):
    """A `.tflite` file cannot be read."""


class RuntimeUnavailableError(MobileQatError):
    """An interpreter is not installed, or refuses the file."""


class DeviceError(MobileQatError):
    """A target of a benchmark is not there, went away, took too long, or cannot run the file.

    Attributes:
        measured: the target's `Outcome` with what was measured until then, None if nothing was.
    """

    measured: Any = None


class LegacyUnavailableError(MobileQatError):
    """`tf_keras` or TFMOT is not installed."""


class CalibrationError(MobileQatError):
    """Activation ranges are missing, collapsed or not finite."""


class RunDirectoryError(MobileQatError):
    """A run directory cannot be used."""


class ClusterError(MobileQatError):
    """Workers cannot train together, or no longer."""


class CheckFailed(MobileQatError):
    """The work was done and a check on its result did not pass."""

    exit_code = 1


class TrainingError(CheckFailed):
    """Training diverged: a loss or a weight is NaN or infinite."""


class InspectionError(CheckFailed):
    """A file that should be fully integer is not."""


class DelegationError(CheckFailed):
    """A delegate took fewer operators of a file than was asked for."""


class ParityError(CheckFailed):
    """The Keras simulation and the interpreter disagree beyond the bar."""
