"""Dropout whose mask is computed from a seed, forward and backward, and so is never kept (the reference, in torch).

Each random word of 32 bits decides over two elements by 16 bits each: an element is dropped where its half is below a
threshold, so that the probability is a multiple of 2^-16 (0.05 becomes 0.0500031). What is left is not scaled up here:
who multiplies anyway does that, by `scale`, so nothing is rounded twice and the mask fits every dtype.

Word i of a seed (two halves of 32 bits, low and high), modulo 2^32:

    z = i·0x9e3779b9 + low;  z = (z ^ z>>16)·0x7feb352d + high;  z = (z ^ z>>15)·0x31848bab;  z ^ z>>16

In C (`lora_cpu.c`) that takes no longer than a copy; all ways to compute it have the same bits. `torch.bernoulli` takes
several times as long as the products of a low-rank pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ops import lora_cpu
from veneer.ops.kernels import measured

LANES = 1 << 16
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """One draw: which elements of an activation are dropped; None for a seed means that none are."""

    seed: Tensor | None = None
    """A whole number of 64 bits, without dimensions, on the device of the activations."""
    threshold: int = 0

    @property
    def scale(self) -> float:
        """What the elements that are left are to be multiplied by."""
        return LANES / (LANES - self.threshold)

    def __call__(self, x: Tensor) -> Tensor:
        """x with its dropped elements set to zero; differentiable."""
        return x if self.seed is None else zeroed(x, self.seed, self.threshold)


NONE = Dropout()


def draw(x: Tensor, p: float) -> Dropout:
    """A new draw for activations x, of probability p; its seed comes from torch's generator, so that seeding that, or a
    checkpoint that restores it, gives the same mask again.
    """
    threshold = min(round(p * LANES), LANES - 1)
    return Dropout(torch.randint(0, 1 << 62, (), device=x.device), threshold) if threshold else NONE


def drawn(module: nn.Dropout, x: Tensor) -> Dropout:
    """What a dropout drops of x at this call: nothing in evaluation, or of whole numbers."""
    return draw(x, module.p) if module.training and module.p and x.is_floating_point() else NONE


def words(seed: Tensor, count: int) -> Tensor:
    """The first `count` random words of a seed, in the lower halves of 64-bit numbers."""
    z = (torch.arange(count, device=seed.device) * 0x9E3779B9 + (seed & _MASK)) & _MASK
    z = (z ^ (z >> 16)) * 0x7FEB352D + ((seed >> 32) & _MASK) & _MASK
    z = (z ^ (z >> 15)) * 0x31848BAB & _MASK
    return z ^ (z >> 16)


def kept(seed: Tensor, threshold: int, count: int) -> Tensor:
    """[count]: whether each element is kept."""
    both = words(seed, (count + 1) // 2)
    return torch.stack([both & 0xFFFF, both >> 16], -1).flatten()[:count] >= threshold


def reference(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """x with its dropped elements, counted in the order of a contiguous tensor, set to zero."""
    return torch.where(
        kept(seed, threshold, x.numel()).view(x.shape), x, torch.zeros((), dtype=x.dtype, device=x.device)
    )


_elsewhere = measured("lora_triton.drop")(reference)


def zeroed(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """The same by the fastest way there is; the gradient is dropped where x was."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad) or not lora_cpu.fits(x):
        found: Tensor = _zeroed(x, seed, threshold)
        return found
    return lora_cpu.drop(x, seed, threshold)


@torch.library.custom_op("veneer::zeroed", mutates_args=())
def _zeroed(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    return lora_cpu.drop(x, seed, threshold) if lora_cpu.fits(x) else _elsewhere(x, seed, threshold)


@_zeroed.register_fake
def _(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.threshold = inputs[2]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return zeroed(gradient, seed, ctx.threshold), None, None


_zeroed.register_autograd(_backward, setup_context=_keep)
