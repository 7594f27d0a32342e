"""OFT: rotate a layer's inputs, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import Before, Delta, Method, Place, Weight
from veneer.errors import MethodError


class _Rotation(Delta):
    """Q [blocks, size·(size - 1)/2], the upper triangles of skew-symmetric matrices."""

    mergeable = True

    def __init__(self, place: Place, size: int, cayley: str) -> None:
        super().__init__()
        self.size, self.cayley = size, cayley
        self.Q = nn.Parameter(torch.zeros(place.shape[1] // size, size * (size - 1) // 2, **place.new))

    def blocks(self) -> Tensor:
        """The rotations [blocks, size, size] by Cayley's transform (I + Q)·(I - Q)^-1."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.Q.device)
        upper = self.Q.new_zeros(len(self.Q), self.size * self.size)
        upper = upper.index_copy(1, rows * self.size + columns, self.Q).unflatten(1, (self.size, self.size))
        skew: Tensor = upper - upper.mT
        one = torch.eye(self.size, dtype=skew.dtype, device=skew.device).expand_as(skew)
        square = skew @ skew
        if self.cayley == "neumann":
            return torch.as_tensor(one + 2 * (skew + square + square @ skew) + square @ square)
        return torch.as_tensor(torch.linalg.solve(one - skew, one + skew, left=False))

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        """The last dimension of x, turned block by block."""
        rotated: Tensor = x.unflatten(-1, (-1, self.size)).unsqueeze(-2) @ turns.to(x.dtype)
        return rotated.flatten(-3)

    def merge(self, weight: Tensor) -> Tensor:
        return self.rotate(weight, self.blocks().mT)


class _RotateInput(_Rotation, Before):
    """base(x·R)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rotate(x, self.blocks())


class _RotateWeight(_Rotation, Weight):
    """w·R^T."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning: a trained block-diagonal rotation of each layer's inputs.

    Formula:
        W' = W·R^T, R = diag(R_1, R_2, ...), R_i = (I + Q_i)·(I - Q_i)^-1 with Q_i skew-symmetric, zero at the start.

    Shapes:
        Q [in / block_size, block_size·(block_size - 1)/2].

    Defaults:
        block_size: of a rotation; it must divide the layer's inputs.
        cayley: "exact" (solves a system) or "neumann" (four powers of its series: cheaper, nearly orthogonal near 0).

    Cost:
        in · (block_size - 1) / 2 parameters a layer. Nothing at inference once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError on an embedding or a convolution, or where block_size does not divide the inputs.

    Paper:
        Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv:2306.07280;
        on inputs: Qiu et al., "Orthogonal Finetuning Made Scalable", 2025, arXiv:2506.19847.

    Example:
        veneer.attach(model, veneer.OFT(block_size=32))
    """

    block_size: Annotated[int, Field(ge=2)] = 32
    cayley: Literal["exact", "neumann"] = "exact"

    def build(self, place: Place) -> Delta:
        if len(place.shape) != 2 or isinstance(place.owner, nn.Embedding):
            raise MethodError("OFT rotates the inputs of matrices. Name linear layers.")
        if place.shape[1] % self.block_size:
            raise MethodError(f"block_size={self.block_size} does not divide {place.shape[1]} inputs. Choose another.")
        inside = place.functional or place.spans  # one role of a fused layer shares its inputs with the others
        return (_RotateWeight if inside else _RotateInput)(place, self.block_size, self.cayley)
