"""What merging replaces, kept so that it can be put back bit for bit."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn


class Original(Protocol):
    """Something that was, and can be again."""

    def restore(self) -> None:
        """Put it back."""


class Values:
    """A copy of a parameter's values; the parameter stays the same object."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name
        self.values = cast(nn.Parameter, owner._parameters[name]).detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the values back."""
        cast(nn.Parameter, self.owner._parameters[self.name]).data.copy_(self.values)


class Storage:
    """A module's class and attributes, its packed tensors among them, which are replaced and never written to."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.attributes = module, type(module), dict(vars(module))

    def restore(self) -> None:
        """Make the module what it was; hooks, children and mode are what they are now."""
        training = self.module.training
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        self.module.__class__ = self.kind
        self.module.training = training
