"""AdapterFusion: attention over several trained adapters, at each sublayer and for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, InstanceOf
from torch import Tensor, nn

from veneer.bottleneck import Beside, Bottleneck, Branch, Placement
from veneer.delta import Delta, Method, Place, Unit
from veneer.errors import MethodError


class Fusion(Branch):
    """y + V·Σ softmax(q·K·A)·A over the parts A."""

    still = frozenset({"parts"})

    def __init__(self, place: Place, placement: Placement, parts: Mapping[str, Bottleneck], strength: float) -> None:
        super().__init__(place, placement)
        (width,) = place.shape
        self.strength = strength
        self.parts = nn.ModuleDict(parts)
        self.query = nn.Parameter(torch.empty(width, width, **place.new).normal_(std=0.02))
        self.query_bias = nn.Parameter(torch.zeros(width, **place.new))
        self.key = nn.Parameter(torch.empty(width, width, **place.new).normal_(std=0.02))
        self.value = nn.Parameter(torch.eye(width, **place.new))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.read(x, y)
        changes = torch.stack([part(z) for part in self.parts.values()], dim=-2)
        query = F.linear(z, self.query.to(z.dtype), self.query_bias.to(z.dtype))
        # q·(K·a) = (Kᵀ·q)·a and Σ s·(V·a) = V·(Σ s·a): one product each, however many parts there are.
        scores = (changes @ F.linear(query, self.key.T.to(z.dtype)).unsqueeze(-1)).squeeze(-1)
        shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(z.dtype)
        mixed = (shares.unsqueeze(-2) @ changes).squeeze(-2)
        return y + F.linear(mixed, self.value.to(z.dtype))

    def regularization(self) -> Tensor | None:
        identity = torch.eye(len(self.value), dtype=self.value.dtype, device=self.value.device)
        return self.strength * (self.value - identity).pow(2).sum() if self.strength else None


@dataclass(frozen=True)
class AdapterFusion(Method):
    """Attention over trained bottleneck adapters, which stay frozen: each token takes from each what helps it.

    `veneer.fuse(model, names)` makes it from adapters on the model; the parts' weights are copied and saved with it.

    Formula:
        y' = y + V · Σ_i s_i · A_i(z), s_i = softmax_i((Q·z + b)ᵀ · K · A_i(z)); z is what the parts read.

    Shapes:
        Q, K, V [d, d] and b [d] at a sublayer of width d, beside the parts' own.

    Defaults:
        parts: the methods of the parts by name, which `veneer.fuse` fills in.
        regularization: strength of the term strength · |V - I|² that training adds to the loss for each sublayer.

        Q and K start normal with standard deviation 0.02, b at zero, V at the identity. A bias of K would drop out.

    Cost:
        3·d² + d trained parameters a sublayer: 21.2 million at the MLPs of BERT-base. All stays at inference.

    Merging:
        None: the attention has no weight form. Keep it attached.

    Errors:
        MethodError for less than two parts, or parts that are no bottleneck adapters of one placement.

    Paper:
        Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021,
        arXiv:2005.00247.
    Example:
        veneer.fuse(model, ["sst", "mnli"], method=veneer.AdapterFusion())
    """

    parts: Mapping[str, InstanceOf[Method]] = field(default_factory=dict)
    regularization: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    unit: ClassVar[Unit] = "sublayer"
    default_where: ClassVar[str] = "mlp"

    def build(self, place: Place) -> Delta:
        parts = sorted(self.parts.items())  # in whatever order a file gives them
        fit = {name: part for name, part in parts if part.unit == self.unit and not part.share([place])}
        built = {name: part.build(place) for name, part in fit.items()}
        branches = {name: delta for name, delta in built.items() if isinstance(delta, Beside)}
        if len(branches) < len(self.parts) or len(branches) < 2:
            raise MethodError("it fuses two or more bottleneck adapters whose places share no weights. Name others.")
        placements = {branch.placement for branch in branches.values()}
        if len(placements) > 1:
            raise MethodError(f"its parts stand at different placements ({', '.join(sorted(placements))}). Fuse alike.")
        bottlenecks = {name: branch.bottleneck for name, branch in branches.items()}
        return Fusion(place, placements.pop(), bottlenecks, self.regularization)
