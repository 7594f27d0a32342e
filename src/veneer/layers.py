"""What a layer computes: the linear map behind its weight, and how that map splits into two thin factors.

A weight W of logical shape [out, in, *kernel] acts on activations; a rank-r change of it is B·A with A: [r, in,
*kernel] and B: [out, r, *1]. Applying A then B to the activations costs r·(in + out) a position where W costs in·out.
The map knows no storage (that is `formats/`) and no method: LoRA, and whatever else factors a weight, asks it for
`down`, `up` and `product`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LinearMap(ABC):
    """How activations meet a weight; every instance is immutable, picklable and holds no tensor."""

    def factors(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for a weight of logical `shape`."""
        out, *rest = shape
        return (rank, *rest), (out, rank, *[1] * (len(rest) - 1))

    def fan_in(self, shape: tuple[int, ...]) -> int:
        """How many inputs meet in one output of A."""
        return math.prod(shape[1:])

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """B·A in the logical shape of the weight."""
        product: Tensor = torch.mm(B.flatten(1), A.flatten(1)).unflatten(1, A.shape[1:])
        return product

    def matrices(self, A: Tensor) -> tuple[Tensor, ...]:
        """The factor's independent parts: itself, or one of each matrix of a stack."""
        return (A,)

    @abstractmethod
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """The activations through the first factor."""

    @abstractmethod
    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """The result of `down` through the second factor."""


@dataclass(frozen=True)
class Matrix(LinearMap):
    """y = x·Wᵀ on the last dimension: Linear, transformers' Conv1D, attention projections."""

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)


@dataclass(frozen=True)
class Stack(LinearMap):
    """y[e] = x[e]·W[e]ᵀ for each matrix of a stack [experts, out, in]; activations are [experts, tokens, in]."""

    def factors(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, out, in_ = shape
        return (experts, rank, in_), (experts, out, rank)

    def fan_in(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        return torch.bmm(B, A)

    def matrices(self, A: Tensor) -> tuple[Tensor, ...]:
        return A.unbind()

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return torch.bmm(x, A.mT)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return torch.bmm(h, B.mT)


@dataclass(frozen=True)
class Lookup(LinearMap):
    """y = W[:, ids]: an embedding is the matrix product with one-hot rows, so its `in` is the vocabulary."""

    def fan_in(self, shape: tuple[int, ...]) -> int:
        return 1

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)


@dataclass(frozen=True)
class Convolution(LinearMap):
    """y = W * x over channels [N, C, *space]: A carries the kernel, B is pointwise."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    edges: tuple[int, ...] = ()

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        convolve = _CONVOLUTIONS[len(self.stride)]
        if self.padding_mode == "zeros":
            return convolve(x, A, None, self.stride, self.padding, self.dilation)
        x = F.pad(x, self.edges, mode=self.padding_mode)
        return convolve(x, A, None, self.stride, 0, self.dilation)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return _CONVOLUTIONS[len(self.stride)](h, B)
