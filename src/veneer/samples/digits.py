"""Handwritten digits as 8 by 8 pixels: the 1,797 that scikit-learn brings (CC BY 4.0).

They are the test set of Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, which thirteen people wrote. Who wrote which is not known, so rows that are held out are by the same
people as those that are learned from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from veneer.samples import packages, whole

DARKEST = 16


def folder() -> Path:
    """A folder of pictures for each digit, written on first use."""
    return whole.cached("digits-1", _write)


def _write(folder: Path) -> None:
    image = packages.extra("PIL.Image", "train")
    digits = packages.extra("sklearn.datasets", "train").load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(digit)
        place.mkdir(exist_ok=True)
        image.fromarray((pixels * (255 / DARKEST)).astype(np.uint8)).save(place / f"{number:04}.png")
