"""A model with no adapter active, as the reference model of trainers that ask for one, TRL's DPOTrainer first."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

import veneer
from veneer.train.evaluate import evaluating


class Reference(nn.Module):
    """The base of a model with adapters, to be called beside it: the same weights, no adapter, no dropout, no copy.

        trainer = trl.DPOTrainer(model, veneer.train.Reference(model), arguments, train_dataset=rows, ...)

    It has no parameters of its own, so no trainer moves, shares out or saves them twice; it computes without gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._of: list[Any] = [
            model,
            model,
        ]  # the model, and its part that is called; in a list, so as not to be modules inside

    @property
    def config(self) -> Any:
        """The model's."""
        return self._of[0].config

    @property
    def base_model(self) -> Reference:
        """The same of the model without its head, which TRL calls apart."""
        found = Reference(self._of[0])
        found._of[1] = self._of[0].base_model
        return found

    def get_output_embeddings(self) -> Any:
        """The model's head."""
        return self._of[0].get_output_embeddings()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the model's forward gives while no adapter acts."""
        whole, part = self._of
        with evaluating(whole), veneer.use(whole):
            return part(*arguments, **options)
