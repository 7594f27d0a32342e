"""nn.MultiheadAttention: projections that are parameters, read by one function, never called as modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from veneer import layers
from veneer.formats.dense import Parameter


class MultiheadAttention(Parameter):
    """`in_proj_weight` (q, k and v fused, [3·width, width]) or three separate ones, and `out_proj.weight`."""

    functional = True

    def weights(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if module._parameters[name] is not None:
                yield "", name
        yield "out_proj", "weight"

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()
