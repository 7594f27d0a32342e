"""Optimizers for adapters: where their states lie, and which one to take."""

from veneer.optim.choosing import optimizer
from veneer.optim.paged import PagedAdamW

__all__ = ["PagedAdamW", "optimizer"]
