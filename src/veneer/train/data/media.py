"""Images and recordings from their files or bytes."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from veneer.errors import DataError
from veneer.train.data.extras import extra


def image(value: dict[str, Any]) -> Any:
    """A PIL image in RGB."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(_content(value)) as found:
            return found.convert("RGB")
    except (UnidentifiedImageError, OSError) as wrong:
        raise DataError(f"{_name(value)} cannot be read as an image: {wrong}.") from wrong


def recording(value: dict[str, Any], rate: int) -> np.ndarray[Any, Any]:
    """Samples of one channel between -1 and 1, float32, `rate` a second.

    WAV is read by scipy; other kinds by soundfile, where that is installed.
    """
    wavfile, signal = extra("scipy.io.wavfile"), extra("scipy.signal")
    try:
        own, samples = wavfile.read(_content(value))
    except ValueError:
        own, samples = _by_soundfile(value)
    except OSError as wrong:
        raise DataError(f"{_name(value)} cannot be read as a recording: {wrong.strerror}.") from None
    if samples.dtype.kind in "iu":
        bits = 8 * samples.dtype.itemsize
        samples = (samples.astype(np.float32) - (128 if samples.dtype.kind == "u" else 0)) / 2 ** (bits - 1)
    samples = samples.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not len(samples):
        raise DataError(f"{_name(value)} is an empty recording.")
    if own != rate:
        shared = math.gcd(own, rate)
        samples = signal.resample_poly(samples, rate // shared, own // shared).astype(np.float32)
    found: np.ndarray[Any, Any] = samples
    return found


def _by_soundfile(value: dict[str, Any]) -> tuple[int, Any]:
    try:
        import soundfile
    except ImportError:
        raise DataError(
            f"{_name(value)} is no WAV file. Convert it to WAV, or run: pip install soundfile, for FLAC, OGG and MP3."
        ) from None
    try:
        samples, rate = soundfile.read(_content(value), dtype="float32")
    except soundfile.LibsndfileError as wrong:
        raise DataError(f"{_name(value)} cannot be read as a recording: {wrong}") from wrong
    return rate, samples


def _content(value: dict[str, Any]) -> Any:
    return io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]


def _name(value: dict[str, Any]) -> str:
    return str(value.get("path") or "A row's file")
