"""Quiet logs, and the same random numbers in every test and every run."""

import logging
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
logging.getLogger("tensorflow").setLevel(logging.ERROR)
logging.getLogger("absl").setLevel(logging.ERROR)
# A shell ignores Ctrl+C in what it starts in the background, and so would every program that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run, and no deadline: the first call of a TensorFlow function is slow.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


def pytest_configure(config):
    # Keras 3 converts its variables to NumPy in a way that NumPy 2 deprecates.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(autouse=True)
def same_random_numbers(request):
    """Seeds Python, NumPy and Keras where a test module uses Keras; leaves the light modules light."""
    keras = getattr(request.module, "keras", None)
    if keras is not None:
        keras.utils.set_random_seed(0)
        keras.backend.clear_session(free_memory=False)
