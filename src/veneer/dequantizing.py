"""The way back from a quantized base to a plain one."""

from __future__ import annotations

import torch
from torch import nn

from veneer import formats, site
from veneer.errors import AdapterError, NotMergeable
from veneer.handle import state_of
from veneer.merging import activations_dtype
from veneer.seams.transformers import forget_quantization


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Make every quantized linear a plain one that holds the numbers its bits stand for, in place; returns the model.

    The dtype is that of the model's other weights. Adapters stay, and act as before. What transformers noted about the
    quantization is taken off, so that the model saves as a plain one.

    Raises AdapterError where an adapter is merged whose unmerging would bring packed weights back, NotMergeable where a
    storage cannot be read.
    """
    if merged := state_of(model).routes.merged:
        raise AdapterError(f"Adapter '{merged[-1]}' is merged. Unmerge it first, or merge it with permanent=True.")
    dtype = activations_dtype(model)
    for path, module in site.base_modules(model):
        form = formats.of(module)
        if form is not None and form.quantized:
            try:
                form.unpack(module, dtype)
            except NotMergeable as error:
                raise NotMergeable(f"{path}: {error}") from None
    forget_quantization(model)
    torch.compiler.reset()
    return model
