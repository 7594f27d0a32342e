"""torch's own attention: projections that one function reads as parameters and no code calls as modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from veneer import layers
from veneer.formats.dense import Parameter


class MultiheadAttention(Parameter):
    """`in_proj_weight` (q, k and v fused, [3·width, width]) or three separate ones, and `out_proj.weight`."""

    def weights(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if module._parameters[name] is not None:
                yield "", name
        yield "out_proj", "weight"

    def functional(self, module: nn.Module) -> bool:
        return True

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()


class TransformerEncoderLayer(MultiheadAttention):
    """nn.TransformerEncoderLayer: its fast path (evaluation without gradients) reads every weight itself."""

    def weights(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        for below, name in super().weights(module.get_submodule("self_attn")):
            yield f"self_attn.{below}".rstrip("."), name
        yield "linear1", "weight"
        yield "linear2", "weight"
