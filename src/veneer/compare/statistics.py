"""Means with confidence intervals over seeds and examples, which are crossed: each seed meets each example.

With x[s, i] of S seeds and n examples, the mean m over both estimates what a new seed would give on a new example:

    x[s, i] = mean + seed[s] + example[i] + rest[s, i]
    SE(m)²  = (MS_examples + MS_seeds - MS_rest) / (S·n), and at least each of MS_examples / (S·n), MS_seeds / (S·n)
    MS_examples = S · var over i of the mean over s        MS_seeds = n · var over s of the mean over i
    MS_rest     = sum (x[s, i] - mean over s - mean over i + m)² / ((S - 1)(n - 1))

which is the two-way random-effects analysis of variance. The interval is m ± t·SE(m), t of Satterthwaite's degrees of
freedom for the terms in SE². With one seed it is the examples' alone, and says nothing of other seeds. Methods are
compared by the same formula on the differences x_A[s, i] - x_B[s, i], pair by pair: what makes a seed or an example
easy for both drops out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from veneer.train.data.extras import extra

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its confidence interval."""

    mean: float
    half: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half:.2g}"


def ratios(values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> Any:
    """x[s, i] whose mean is sum(values) / sum(weights): that ratio, plus (value - ratio · weight) / mean weight.

    With weights of one it is the values themselves; otherwise the linear part of the ratio (delta method).
    """
    value, weight = np.asarray(values, float), np.asarray(weights, float)
    ratio = value.sum() / weight.sum()
    return ratio + (value - ratio * weight) / weight.mean()


def interval(x: Any) -> Interval:
    """The mean of x[s, i] over seeds and examples with its interval; infinite with a single example."""
    seeds, examples = x.shape
    mean = float(x.mean())
    if examples < 2:
        return Interval(mean, float("inf"))
    by_example, by_seed = x.mean(0), x.mean(1)
    total = x.size
    of_examples = seeds * by_example.var(ddof=1) / total
    if seeds == 1:
        return Interval(mean, _t(examples - 1) * float(of_examples) ** 0.5)
    of_seeds = examples * by_seed.var(ddof=1) / total
    rest = x - by_example - by_seed[:, None] + mean
    of_rest = (rest**2).sum() / ((seeds - 1) * (examples - 1)) / total
    variance = max(of_examples + of_seeds - of_rest, of_examples, of_seeds)
    if variance == 0:
        return Interval(mean, 0.0)
    spread = of_examples**2 / (examples - 1) + of_seeds**2 / (seeds - 1)
    spread += of_rest**2 / ((seeds - 1) * (examples - 1))
    return Interval(mean, _t(float(variance**2 / spread)) * float(variance) ** 0.5)


def _t(freedom: float) -> float:
    """Student's t for the level, both sides."""
    extra("scipy")
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))
