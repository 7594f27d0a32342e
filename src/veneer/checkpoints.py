"""What transformers' Trainer reads off a model: what a checkpoint holds, and whether a quantized base may train.

`save_pretrained`, and with it every checkpoint of a Trainer, leaves out the keys in `_keys_to_ignore_on_save`, and
loading such a checkpoint takes for granted that they are missing; so a model with adapters names there what is frozen.
It also renames keys into the form that a family's files have, but a Trainer does not rename them back, so that an
adapter on experts would not be found again. A quantized model is refused until something trains beside it, which
`is_quantized` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from veneer import site
from veneer.seams import transformers

_KEYS, _RENAMING = "_keys_to_ignore_on_save", "_weight_conversions"


class Frozen(Set[str]):
    """The keys of a model's state that training with adapters leaves as they are, read off the model each time.

    A parameter that trains beside the adapters, and running statistics, change and so belong into a checkpoint.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before: set[str] = set(model._keys_to_ignore_on_save or ())
        self.renaming = {_RENAMING: vars(model)[_RENAMING]} if _RENAMING in vars(model) else {}
        self.quantized = bool(vars(model).get("is_quantized")) and model.hf_quantizer.is_trainable
        self.merged = False

    def __iter__(self) -> Iterator[str]:
        yield from self.before
        if self.merged:
            return
        changing = {name for name, one in self.model.named_parameters(remove_duplicate=False) if one.requires_grad}
        within = tuple(
            f"{path}."
            for path, module in self.model.named_modules()
            if isinstance(module, site.Site) or (isinstance(module, _NormBase) and module.track_running_stats)
        )
        yield from (key for key in self.model.state_dict() if key not in changing and not key.startswith(within))

    def __contains__(self, key: object) -> bool:
        return any(key == one for one in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def begin(model: nn.Module) -> None:
    """From now on checkpoints of the model hold its adapters, and a Trainer takes it although its base is quantized."""
    if transformers.is_pretrained(model):
        frozen = Frozen(model)
        vars(model).update({_KEYS: frozen, _RENAMING: []})
        if frozen.quantized:
            vars(model)["is_quantized"] = False


def merged(model: nn.Module, now: bool) -> None:
    """Say whether an adapter is folded into the weights, which belong into a checkpoint for that long."""
    frozen = vars(model).get(_KEYS)
    if isinstance(frozen, Frozen):
        frozen.merged = now
        vars(model).pop(_RENAMING, None)
        vars(model).update(frozen.renaming if now else {_RENAMING: []})


def end(model: nn.Module) -> None:
    """The reverse of `begin`."""
    frozen = vars(model).get(_KEYS)
    if isinstance(frozen, Frozen):
        merged(model, True)
        vars(model)[_KEYS] = frozen.before
        if frozen.quantized:
            vars(model)["is_quantized"] = True


def unpacked(model: Any) -> None:
    """Quantized linears have become dense, or packed again: what the config says of them, which is saved, follows."""
    transformers.note_dense(model)
