"""How many parameters a model has, and how many of them train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from veneer import formats


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has. Quantized weights count their elements, shared ones count once."""

    trainable: int
    total: int

    @property
    def percentage(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters trainable ({self.percentage:.3f}%)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and total parameters of a model, adapters included."""
    trainable = total = 0
    seen: set[int] = set()
    for module in model.modules():
        form = formats.of(module)
        weights = (
            [(name, form.tensor(module, name)) for below, name in form.weights(module) if not below] if form else []
        )
        for name, parameter in (*weights, *module.named_parameters(recurse=False)):
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count = form.count(module, name) if form else parameter.numel()
            total += count
            trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total)
