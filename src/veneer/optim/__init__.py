"""Optimizers for adapters: where their states lie, and which one to take."""

from veneer.optim.choosing import optimizer
from veneer.optim.flat import FlatAdamW
from veneer.optim.paged import PagedAdamW

__all__ = ["FlatAdamW", "PagedAdamW", "optimizer"]
