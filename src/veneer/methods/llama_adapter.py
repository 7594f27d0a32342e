"""LLaMA-Adapter: trained prompts that the top layers attend to apart, through a gate that opens from zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import Delta, KeyValue, Method, Place, Product, Unit
from veneer.errors import MethodError

Count = Annotated[int, Field(ge=1)]


class GatedPrompt(KeyValue):
    """Keys and values of a trained prompt, as the layer's own frozen projections make them; the values are gated."""

    apart = True
    key: Product
    value: Product

    def __init__(self, place: Place, length: int) -> None:
        super().__init__()
        heads = place.shape[0]
        key, value = place.projections["k"], place.projections["v"]
        self.borrow(key=key.product(), value=value.product())
        self.heads = heads
        self.prompt = nn.Parameter(torch.randn(length, key.shape[1], **place.new))
        self.gate = nn.Parameter(torch.zeros(heads, 1, 1, **place.new))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (self._projected(product, k) for product in (self.key, self.value))
        value = torch.tanh(self.gate).to(v) * value
        return key.expand(len(k), -1, -1, -1), value.expand(len(k), -1, -1, -1)

    def _projected(self, product: Product, like: Tensor) -> Tensor:
        y: Tensor = product(self.prompt.to(like))
        bias = product.bias()
        y = y if bias is None else y + bias
        split: Tensor = y.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return split


@dataclass(frozen=True)
class LLaMAAdapter(Method):
    """Zero-gated attention to trained prompts in the topmost blocks; it starts as the base exactly.

    Formula:
        attention(Q, K, V) + tanh(g) · attention(Q, P·W_K + b_K, P·W_V + b_V): two softmaxes, one over the layer's own
        keys, one over the prompt's, which are neither rotated nor normalised.

    Shapes:
        P [length, width of the model], g [kv heads, 1, 1], zero at the start, at each place.

    Defaults:
        length: positions of each prompt.
        layers: in how many of the topmost blocks; a model with fewer has prompts in all.

    Cost:
        length · width + kv heads parameters a place: 1.2 million in 30 of the 32 blocks of LLaMA-7B. Each call projects
        the prompt again and attends to it apart.

    Merging:
        Not possible: it acts on activations.

    Errors:
        MethodError where keys or values are not one projection of the stream each (DeepSeek's latent attention), or the
        model attends in code of its own.

    Paper:
        Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", ICLR 2024,
        arXiv:2303.16199. There g is one number a head; where heads share keys it is one a group.
    Example:
        veneer.attach(model, veneer.LLaMAAdapter(length=10))
    """

    length: Count = 10
    layers: Count = 30
    unit: ClassVar[Unit] = "attention"
    default_where: ClassVar[str] = "attention"
    learning_rate: ClassVar[float] = 5e-3

    def select(self, places: Sequence[Place]) -> Sequence[Place]:
        top = sorted({place.layer for place in places})[-self.layers :]
        return [place for place in places if place.layer in top]

    def build(self, place: Place) -> Delta:
        heads, *widths = place.shape
        if place.functional:
            raise MethodError("The model attends in code of its own, beside which nothing can be attended. Use LoRA.")
        for role, width in zip("kv", widths, strict=True):
            if role not in place.projections or place.projections[role].shape[0] != heads * width:
                raise MethodError(f"The attention's {role} is not one projection of {heads} x {width}. Use LoRA there.")
        return GatedPrompt(place, self.length)
