"""What methods that put trained embeddings in front of the tokens have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from veneer.delta import Input, Place
from veneer.errors import MethodError


def check_stack(place: Place) -> None:
    """Raise MethodError where nothing can be put in front of the tokens."""
    if "stack" not in place.sources:
        raise MethodError(
            "Nothing can be put in front of these tokens, because no module that takes input_ids, inputs_embeds and "
            "attention_mask holds this embedding as its only one. Use a method on weights, such as LoRA."
        )


class Prompt(Input):
    """Trained embeddings [slots, width] in front of those of the tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.slots = length

    @abstractmethod
    def prompt(self) -> Tensor:
        """The embeddings as they are now."""

    def forward(self, ids: Tensor | None, embeddings: Tensor) -> Tensor:
        front = self.prompt().to(embeddings.dtype).to(embeddings.device)
        return torch.cat([front.expand(len(embeddings), -1, -1), embeddings], dim=1)


class Plain(Prompt):
    """Embeddings that are trained themselves."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(len(start))
        self.embeddings = nn.Parameter(start)

    def prompt(self) -> Tensor:
        return self.embeddings


def mlp(widths: Sequence[int], **new: Any) -> nn.Sequential:
    """Linear layers between these widths, with ReLU between the layers."""
    layers = [nn.Linear(one, other, **new) for one, other in pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


class BidirectionalLSTM(nn.Module):
    """[length, width] becomes [length, 2 · hidden]. As an `nn.LSTM` computes it, which torch.compile refuses."""

    def __init__(self, width: int, hidden: int, layers: int, **new: Any) -> None:
        super().__init__()
        self.hidden, self.layers = hidden, layers
        for name, parameter in nn.LSTM(width, hidden, layers, bidirectional=True, **new).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        start = x.new_zeros(2 * self.layers, 1, self.hidden)
        weights: list[Tensor] = list(self.parameters())
        output, _, _ = torch.lstm(
            x[:, None], (start, start), weights, has_biases=True, num_layers=self.layers, dropout=0.0,
            train=self.training, bidirectional=True, batch_first=False,
        )  # fmt: skip
        return output[:, 0]
