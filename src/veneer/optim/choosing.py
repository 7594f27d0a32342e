"""optimizer: the optimizer of that name over an adapter's parameter groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from veneer.errors import OptimizerError, closest
from veneer.handle import Adapter
from veneer.optim.flat import FlatAdamW
from veneer.optim.paged import PagedAdamW

PAGED_FROM = 100_000
"""bitsandbytes pages the states of tensors with at least so many elements."""


def optimizer(
    adapter: Adapter,
    name: str = "adamw",
    *,
    lr: float,
    lora_plus_ratio: float | None = None,
    head_lr: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer over what the adapter trains, in its groups (`Adapter.parameter_groups`).

    | name | class | states of float32 parameters |
    |---|---|---|
    | `adamw` | torch's `AdamW` | on the device, 8 bytes each |
    | `flat` | `FlatAdamW`, one call for all tensors | on the device, 8 bytes each |
    | `paged` | `PagedAdamW` | in the host's memory or on disk, 8 bytes each |
    | `paged-bitsandbytes` | bitsandbytes' `PagedAdamW` | CUDA's unified memory, if of 100,000 elements or more |
    | `adamw-8bit` | bitsandbytes' `AdamW8bit` | 2 bytes each in tensors of 4,096 elements or more, on a CPU too |

    `options` go to the optimizer's class: `betas`, `eps`, `weight_decay`, and what else it takes, such as `window`.

    Raises OptimizerError for an unknown name, where bitsandbytes is not installed, and for `paged-bitsandbytes` on a
    CPU, where it pages nothing. Where it pages a part only, it warns of the share. Papers: Dettmers et al., "8-bit
    Optimizers via Block-wise Quantization", ICLR 2022, arXiv:2110.02861; "QLoRA", NeurIPS 2023, arXiv:2305.14314.
    """
    if name not in _BUILDERS:
        raise OptimizerError(f"There is no optimizer '{name}'.{closest(name, _BUILDERS)} All: {', '.join(_BUILDERS)}.")
    build = _BUILDERS[name](adapter)
    built: torch.optim.Optimizer = build(adapter.parameter_groups(lr, lora_plus_ratio, head_lr), lr=lr, **options)
    return built


def paged_share(adapter: Adapter) -> float:
    """Which share of the adapter's trained parameters lies in tensors that bitsandbytes pages: from 0 to 1."""
    sizes = [parameter.numel() for parameter in adapter.parameters()]
    return sum(size for size in sizes if size >= PAGED_FROM) / max(sum(sizes), 1)


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise OptimizerError(f"'{name}' needs bitsandbytes. Install it, or take 'paged'.") from error
    return bitsandbytes.optim


def _paged_bitsandbytes(adapter: Adapter) -> Any:
    share = f"tensors of {PAGED_FROM:,} elements or more: {paged_share(adapter):.1%} of what '{adapter.name}' trains"
    if any(parameter.device.type == "cpu" for parameter in adapter.parameters()):
        raise OptimizerError(
            f"bitsandbytes pages nothing on a CPU, and elsewhere only {share}. Take 'paged', which pages all."
        )
    if paged_share(adapter) < 1:
        warnings.warn(
            f"bitsandbytes pages only {share}; other states stay on the device. 'paged' pages all.",
            stacklevel=3,
        )
    return _bitsandbytes("paged-bitsandbytes").PagedAdamW


_BUILDERS: dict[str, Callable[[Adapter], Any]] = {
    "adamw": lambda adapter: torch.optim.AdamW,
    "flat": lambda adapter: FlatAdamW,
    "paged": lambda adapter: PagedAdamW,
    "paged-bitsandbytes": _paged_bitsandbytes,
    "adamw-8bit": lambda adapter: _bitsandbytes("adamw-8bit").AdamW8bit,
}
NAMES = tuple(_BUILDERS)
"""What `optimizer` can be asked for."""
