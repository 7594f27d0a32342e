"""P-tuning: prompt tuning through a small network that makes the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import Delta, Method, Place, Unit
from veneer.methods.prompt import PromptTuning
from veneer.prompts import BidirectionalLSTM, Plain, Prompt, check_stack, mlp

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class PTuning(Method):
    """A soft prompt made by a network while training; saved as the prompt it has made, a `PromptTuning`.

    Formula:
        X' = [P; X] with P = MLP(E), or P = MLP(LSTM(E)) with an LSTM that reads E both ways; activations are ReLU.

    Shapes:
        E [length, width]. "mlp": `layers` layers of `hidden` and one of width. "lstm": `layers` layers of `hidden` each
        way, then one of 2 · hidden and one of width.

    Defaults:
        length: tokens in front.
        encoder: the network, "mlp" or "lstm".
        hidden: its width; None is the width of the embedding.
        layers: its hidden layers.

    Cost:
        "mlp" trains length · width + 2 · width · hidden + (layers - 1) · hidden² weights, and biases. Saved, and at
        inference, it costs what `PromptTuning` costs.

    Merging:
        Not possible: it acts on activations.

    Errors:
        MethodError for an embedding that nothing can be put in front of.

    Paper:
        Liu et al., "GPT Understands, Too", AI Open 2023, arXiv:2103.10385.
    Example:
        veneer.attach(model, veneer.PTuning(length=20, encoder="lstm"))
    """

    length: Count = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: Count | None = None
    layers: Count = 2
    unit: ClassVar[Unit] = "input"
    default_where: ClassVar[str] = "input"
    learning_rate: ClassVar[float] = 2e-3

    def build(self, place: Place) -> Delta:
        check_stack(place)
        return _Encoded(place, self)

    def folded(self, delta: Delta) -> tuple[Method, Delta]:
        assert isinstance(delta, Prompt)
        return PromptTuning(self.length), Plain(delta.prompt().detach())


class _Encoded(Prompt):
    """A prompt that a network makes of trained embeddings."""

    def __init__(self, place: Place, method: PTuning) -> None:
        super().__init__(method.length)
        width = place.shape[0]
        hidden = method.hidden or width
        self.embeddings = nn.Parameter(torch.randn(method.length, width, **place.new))
        if method.encoder == "mlp":
            self.network: nn.Module = mlp([width, *[hidden] * method.layers, width], **place.new)
        else:
            lstm = BidirectionalLSTM(width, hidden, method.layers, **place.new)
            self.network = nn.Sequential(lstm, mlp([2 * hidden, 2 * hidden, width], **place.new))

    def prompt(self) -> Tensor:
        return self.network(self.embeddings)  # type: ignore[no-any-return]
