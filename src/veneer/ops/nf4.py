"""NF4: four bits a weight, on levels that a normal distribution fills evenly (the reference, in plain torch).

A weight is cut, row by row, into blocks; each is divided by its largest magnitude, and every value becomes the number
of the nearest of 16 levels. Two numbers share a byte, the first in the high half. With double quantization the blocks'
magnitudes are themselves stored in 8 bits, in blocks of 256 around their mean: 4.127 bits a weight in all.

Paper: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv:2305.14314. The bytes are
those of bitsandbytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
OUTER = 256
"""How many magnitudes share a second-level one."""


@functools.cache
def levels(device: torch.device | str = "cpu") -> Tensor:
    """The 16 levels, ascending; one tensor for all callers."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@functools.cache
def dynamic_levels(device: torch.device | str = "cpu") -> Tensor:
    """The 256 levels of the 8-bit dynamic type: seven signed decades, each of twice the steps below; one tensor."""
    found = [torch.tensor([0.0, 1.0], device="cpu")]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values.to(device)


@dataclass(frozen=True)
class Packed:
    """A quantized weight: bytes [ceil(n / 2), 1], and a magnitude a block, in float32 or in 8 bits."""

    data: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block_size: int
    outer: Tensor | None = None
    """Second-level magnitudes; None without double quantization."""
    offset: Tensor | None = None
    """The mean that was taken off the magnitudes."""

    @property
    def size(self) -> int:
        """Stored bytes."""
        stored = [self.data, self.absmax, self.outer, self.offset]
        return sum(t.numel() * t.element_size() for t in stored if t is not None)

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.size / max(1, torch.Size(self.shape).numel())


def quantize(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Packed:
    """Pack a finite weight of any shape; the last block may be partial. Ties go to the lower level."""
    scaled, absmax = _scaled(weight.detach().float().flatten(), block_size)
    codes = _nearest(scaled, levels(weight.device))
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_full((1,), LEVELS.index(0.0))])
    data = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
    packed = Packed(data, absmax, tuple(weight.shape), block_size)
    return quantize_magnitudes(packed) if double_quant else packed


def quantize_magnitudes(packed: Packed) -> Packed:
    """The same with its float32 magnitudes in 8 bits: double quantization."""
    offset = packed.absmax.mean()
    scaled, outer = _scaled(packed.absmax - offset, OUTER)
    if scaled.device.type == "cpu":  # where bitsandbytes looks the number up in a table of 65,536 steps
        scaled = ((scaled + 1) * 32767.5 + 0.5).floor() / 65535 * 2 - 1
    inner = _nearest(scaled, dynamic_levels(scaled.device))
    inner[(outer == 0).repeat_interleave(OUTER)[: len(inner)]] = 0  # as bitsandbytes; any level of nothing is nothing
    return Packed(packed.data, inner, packed.shape, packed.block_size, outer, offset)


def _scaled(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(the values of each block divided by its largest magnitude, those magnitudes)."""
    whole = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax = whole.abs().amax(1)
    inverse = torch.where(absmax > 0, 1 / absmax, torch.zeros_like(absmax))
    return (whole * inverse.unsqueeze(1)).clamp(-1, 1).flatten()[: len(flat)], absmax


def _nearest(scaled: Tensor, table: Tensor) -> Tensor:
    """The number of the nearest level of each value."""
    return torch.bucketize(scaled, middles(table)).to(torch.uint8)


def middles(table: Tensor) -> Tensor:
    """Where the nearest level changes."""
    return (table[1:] + table[:-1]) / 2


def magnitudes(packed: Packed, blocks: range | None = None) -> Tensor:
    """The float32 magnitude of each block, or of some consecutive ones."""
    blocks = blocks if blocks is not None else range(len(packed.absmax))
    absmax = packed.absmax[blocks.start : blocks.stop]
    if packed.outer is None or packed.offset is None:
        return absmax
    values = dynamic_levels(absmax.device)[absmax.int()]
    first = blocks.start // OUTER
    outer = packed.outer[first : -(-blocks.stop // OUTER)].repeat_interleave(OUTER)
    return values * outer[blocks.start - first * OUTER :][: len(values)] + packed.offset


def apart(packed: Packed) -> bool:
    """Whether each matrix of a stack is made of whole blocks."""
    return torch.Size(packed.shape[-2:]).numel() % packed.block_size == 0


def matrix(packed: Packed, number: int) -> Packed:
    """One matrix of a stack whose matrices are `apart`, or the only one; of a stack, with magnitudes in float32."""
    if len(packed.shape) == 2:
        return packed
    size = torch.Size(packed.shape[-2:]).numel()
    blocks = size // packed.block_size
    scales = magnitudes(packed, range(number * blocks, (number + 1) * blocks))
    data = packed.data[number * size // 2 : (number + 1) * size // 2]
    return Packed(data, scales, packed.shape[-2:], packed.block_size)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The dense weight: level times magnitude in float32, rounded once to `dtype`."""
    codes = torch.stack([packed.data >> 4, packed.data & 15], dim=-1).flatten()[: torch.Size(packed.shape).numel()]
    values = levels(codes.device)[codes.int()]
    scales = magnitudes(packed).repeat_interleave(packed.block_size)[: len(values)]
    return (values * scales).to(dtype).view(packed.shape)
