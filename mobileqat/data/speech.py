"""Spoken words as pictures: MFCC features of short clips, and the datasets that are made of them.

A clip is cut or padded with silence to one second, and cut into windows of 40 ms every 20 ms.  Per window

    features = DCT-II(log(mel filters . |FFT(hann * samples)|**2)), the first 10 coefficients of 40 filters,

as in "Hello Edge" (Zhang et al. 2017): 49 x 10 numbers a second.  NumPy only, so that a device's code can be held
against it.
"""

from __future__ import annotations

import wave
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mobileqat.data.builtin import local_folder
from mobileqat.data.npz import read_npz
from mobileqat.errors import DataError
from mobileqat.progress import track

FSDD_RATE = 8000
FSDD_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/master.zip"
FSDD_SPLITS = ("official", "speakers")
# Of the six speakers, the two whose recordings are the "speakers" split's test.
FSDD_TEST_SPEAKERS = ("lucas", "theo")
FSDD_TEST_TAKES = 5
KWS_CLASSES = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes", "silence", "unknown")
# The input grid of MLPerf's own int8 model, which its samples are stored on: value = scale * (integer - zero point).
KWS_SCALE, KWS_ZERO_POINT = 0.5847029089927673, 83
KWS_CALIBRATION = 5  # every fifth clip of a class

FILTERS = 40
COEFFICIENTS = 10
# Quieter than one step of 16-bit audio; keeps silence finite.
SMALLEST_ENERGY = 1e-6


class Clip(NamedTuple):
    """A recording: int16 samples, the digit, who spoke it, and the number of the take."""

    samples: np.ndarray
    digit: int
    speaker: str
    take: int


def load_fsdd(*, split: str = "official") -> dict:
    """Free Spoken Digit Dataset as MFCC, float32 (n, 49, 10, 1): six speakers, ten digits, fifty takes of each.

    Args:
        split: "official": takes 0 to 4 of everybody are the test, 300 clips; "speakers": two speakers are the test,
            1000 clips of voices that training never hears.
    """
    if split not in FSDD_SPLITS:
        raise DataError(f"fsdd: split must be one of {', '.join(FSDD_SPLITS)}. Received: split={split!r}")
    clips = list(_fsdd_clips())
    is_test = np.array(
        [clip.take < FSDD_TEST_TAKES if split == "official" else clip.speaker in FSDD_TEST_SPEAKERS for clip in clips]
    )
    x, y = mfcc((clip.samples for clip in clips), FSDD_RATE), np.array([clip.digit for clip in clips], np.int64)
    return {
        "x_train": x[~is_test],
        "y_train": y[~is_test],
        "x_test": x[is_test],
        "y_test": y[is_test],
        "class_names": [str(digit) for digit in range(10)],
    }


def load_kws01() -> dict:
    """MLPerf Tiny's 1000 keyword clips as MFCC (n, 49, 10, 1), on the grid that they come on.

    They are test samples without a training set.  A fifth of each class becomes "train", to calibrate on, and is never
    scored.
    """
    folder = local_folder("mlperf-tiny/npz")
    if folder is None:
        raise DataError(
            "dataset 'kws01' is MLPerf Tiny's keyword sample set: put it in <folder>/mlperf-tiny/npz/kws01.npz and set "
            "MOBILEQAT_DATA=<folder>."
        )
    arrays = read_npz(folder / "kws01.npz")
    if not {"mfcc", "y"} <= arrays.keys():
        raise DataError(f"{folder / 'kws01.npz'} has {sorted(arrays)}; expected mfcc and y. Replace the file.")
    integers, y = arrays["mfcc"].astype(np.float32), arrays["y"].astype(np.int64)
    x = np.float32(KWS_SCALE) * (integers - KWS_ZERO_POINT)
    # Numbered within each class, so that every class is calibrated on.
    is_train = np.array([np.sum(y[:index] == label) % KWS_CALIBRATION == 0 for index, label in enumerate(y)])
    low, high = (float(np.float32(KWS_SCALE) * np.float32(bound - KWS_ZERO_POINT)) for bound in (-128, 127))
    return {
        "x_train": x[is_train],
        "y_train": y[is_train],
        "x_test": x[~is_train],
        "y_test": y[~is_train],
        "class_names": KWS_CLASSES,
        "value_range": (low, high),
    }


# ------------------------------------------------------------------ features


def mfcc(clips: Iterable[np.ndarray], rate: int, seconds: float = 1.0) -> np.ndarray:
    """Mel-frequency cepstral coefficients of clips.

    Args:
        clips: int16 samples, each of any length.
        rate: samples per second.
        seconds: what each clip is cut or padded to, at its end.

    Returns:
        float32 (clips, windows, 10, 1); one second has 49 windows.
    """
    length, window, hop = int(rate * seconds), rate * 40 // 1000, rate * 20 // 1000
    starts = np.arange(0, length - window + 1, hop)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(window) + 0.5) / window)
    size = 1 << (window - 1).bit_length()
    filters, cosines = mel_filters(rate, size), _cosines()
    features = []
    for samples in track(clips, "features of speech", "clips"):
        padded = np.zeros(length)
        padded[: len(samples)] = samples[:length] / 32768
        power = np.abs(np.fft.rfft(padded[starts[:, np.newaxis] + np.arange(window)] * hann, size)) ** 2
        features.append(np.log(np.maximum(power @ filters, SMALLEST_ENERGY)) @ cosines)
    return np.asarray(features, np.float32)[..., np.newaxis]


@lru_cache
def mel_filters(rate: int, size: int) -> np.ndarray:
    """Triangles of equal width on the mel scale, 20 Hz to half the rate: (size // 2 + 1, 40)."""

    def to_mel(hertz):
        return 2595 * np.log10(1 + np.asarray(hertz) / 700)

    edges = np.linspace(to_mel(20), to_mel(rate / 2), FILTERS + 2)
    mels = to_mel(np.arange(size // 2 + 1) * rate / size)[:, np.newaxis]
    rising = (mels - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mels) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0)


def _cosines() -> np.ndarray:
    """The orthonormal DCT-II, (40, 10)."""
    row, column = np.arange(FILTERS)[:, np.newaxis], np.arange(COEFFICIENTS)
    cosines = np.cos(np.pi * (row + 0.5) * column / FILTERS) * np.sqrt(2 / FILTERS)
    cosines[:, 0] /= np.sqrt(2)
    return cosines


# ------------------------------------------------------------------ files


def _fsdd_clips() -> Iterator[Clip]:
    folder = local_folder("fsdd")
    if folder is not None and (folder / "fsdd.npz").is_file():
        yield from _packed_clips(folder / "fsdd.npz")
        return
    recordings = (folder or _download()) / "recordings"
    files = sorted(recordings.glob("*.wav"))
    if not files:
        raise DataError(f"{recordings} has no .wav files; expected the recordings of the Free Spoken Digit Dataset.")
    for file in files:
        yield _read_clip(file)


def _packed_clips(path: Path) -> Iterator[Clip]:
    """Clips in one file: `audio`, all samples in a row, `offsets` (n + 1), `digit`, `speaker`, `take`."""
    arrays = read_npz(path)
    wanted = {"audio", "offsets", "digit", "speaker", "take"}
    if not wanted <= arrays.keys():
        raise DataError(f"{path} has {sorted(arrays)}; expected {', '.join(sorted(wanted))}. Replace the file.")
    parts = np.split(arrays["audio"], arrays["offsets"][1:-1])
    for samples, digit, speaker, take in zip(parts, arrays["digit"], arrays["speaker"], arrays["take"], strict=True):
        yield Clip(samples, int(digit), str(speaker), int(take))


def _read_clip(file: Path) -> Clip:
    """A file named `{digit}_{speaker}_{take}.wav`."""
    try:
        digit, speaker, take = file.stem.split("_")
        with wave.open(str(file), "rb") as recording:
            form = (recording.getframerate(), recording.getsampwidth(), recording.getnchannels())
            samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise DataError(f"cannot read the recording {file}: {error}. Replace or remove it.") from error
    if form != (FSDD_RATE, 2, 1):
        raise DataError(f"{file} has (rate, bytes, channels) {form}; expected {(FSDD_RATE, 2, 1)}. Convert it.")
    return Clip(samples, int(digit), speaker, int(take))


def _download() -> Path:
    import keras

    try:
        path = keras.utils.get_file("free-spoken-digit-dataset.zip", FSDD_URL, extract=True, cache_subdir="datasets")
    except Exception as error:
        # Keras raises a bare Exception when a download fails.
        raise DataError(
            f"dataset 'fsdd': {FSDD_URL} cannot be fetched: {error}. Check the network, or put its files in "
            "<folder>/fsdd/recordings and set MOBILEQAT_DATA=<folder>."
        ) from error
    found = sorted(Path(path).rglob("recordings"))
    if not found:
        raise DataError(f"{path} has no folder 'recordings'; expected the Free Spoken Digit Dataset. Remove it.")
    return found[0].parent
