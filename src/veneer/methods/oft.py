"""OFT: what goes into a layer is rotated, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import Before, Delta, Method, Place, Weight
from veneer.errors import MethodError


class _Rotation(Delta):
    """The entries above the diagonal of a skew-symmetric Q for each block; R = (I + Q)⁻¹ · (I - Q)."""

    mergeable = True

    def __init__(self, place: Place, size: int, blocks: int, terms: int | None) -> None:
        super().__init__()
        self.size, self.terms = size, terms
        self.skew = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2, **place.new))

    def rotations(self) -> Tensor:
        """R [blocks, size, size]; with `terms`, I + 2Q + 2Q² + ..., the last power once, which is Rᵀ, as in PEFT."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.skew.device)
        Q = self.skew.new_zeros(len(self.skew), self.size, self.size)
        Q[:, rows, columns] = self.skew
        Q = Q - Q.mT
        one = torch.eye(self.size, dtype=Q.dtype, device=Q.device)
        if self.terms is None:
            return cast(Tensor, torch.linalg.solve(one + Q, one - Q, left=False))
        powers = [one.expand_as(Q), *accumulate([Q] * (self.terms - 1), torch.matmul)]
        return powers[0] + 2 * sum(powers[1:-1], torch.zeros_like(Q)) + powers[-1]

    def rotate(self, x: Tensor, R: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, self.size))
        return torch.einsum("...bi,bij->...bj", x, R.to(x.dtype).expand(x.shape[-2], -1, -1)).flatten(-2)

    def merge(self, weight: Tensor) -> Tensor:
        return self.rotate(weight, self.rotations().mT)


class _Before(_Rotation, Before):
    def forward(self, x: Tensor) -> Tensor:
        return self.rotate(x, self.rotations())


class _Inside(_Rotation, Weight):
    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning: the input of a layer is rotated by trained block-diagonal orthogonal matrices.

    Formula:
        y = base(x · R), W' = W · Rᵀ; R is block-diagonal, R = (I - Q) · (I + Q)⁻¹ by block, Q skew-symmetric.

    Shapes:
        skew [in / block_size, block_size · (block_size - 1) / 2], zero at first; one row with block_share.

    Defaults:
        block_size: width of a block; it divides the width of every input.
        block_share: one block for all of a layer's.
        num_cayley_neumann_terms: so many of the series of Rᵀ stand for R, as in PEFT, which is quicker; None inverts.

    Cost:
        in · (block_size - 1) / 2 parameters a layer, and block_size products a feature. No cost once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a block_size that does not divide the input's width, and for what is no matrix.

    Paper:
        Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv:2306.07280.
    Example:
        veneer.attach(model, veneer.OFT(block_size=32), where="linear")
    """

    block_size: Annotated[int, Field(ge=2)] = 32
    block_share: bool = False
    num_cayley_neumann_terms: Annotated[int, Field(ge=4)] | None = None

    def build(self, place: Place) -> Delta:
        if len(place.shape) > 2 or isinstance(place.owner, nn.Embedding):
            raise MethodError("OFT rotates the features of linear layers alone. Leave it out of `where`.")
        if (width := place.shape[1]) % self.block_size:
            raise MethodError(
                f"block_size={self.block_size} does not divide the input's width {width}. Set one that does."
            )
        blocks = 1 if self.block_share else width // self.block_size
        return (_Inside if place.functional else _Before)(place, self.block_size, blocks, self.num_cayley_neumann_terms)
