"""Turning keys to another position, in models that rotate keys by their position.

Which dimensions form a pair, and by which angle each turns, is read off the model: one token alone attends to itself
whatever its position, so that its keys at two positions differ by the rotation and nothing else. The angles are those
that the model hands to its attentions; every known way of pairing is tried, and the one that fits the keys is taken.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import UnreadableModel
from veneer.seams import anatomy, transformers

_FITS = 1e-2
"""Relative: rounding in bfloat16 stays below, a wrong pairing is of the order of one."""


@dataclass(frozen=True)
class Rotation:
    """Dimensions `first` and `second` of a key form pairs, and each pair turns by an angle of this cosine and sine."""

    first: Tensor
    second: Tensor
    cosine: Tensor
    sine: Tensor

    def __call__(self, keys: Tensor) -> Tensor:
        """The keys [..., width], turned in double precision."""
        x, y = (keys[..., index].double() for index in (self.first, self.second))
        turned = keys.to(torch.float64, copy=True)
        turned[..., self.first] = x * self.cosine - y * self.sine
        turned[..., self.second] = x * self.sine + y * self.cosine
        return turned.to(keys.dtype)


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[int, dict[str, Rotation]]] = weakref.WeakKeyDictionary()


def turn(model: nn.Module, path: str, keys: Tensor, by: int) -> Tensor:
    """Keys [heads, length, width] of the attention at `path`, as they are `by` positions further on.

    Raises UnreadableModel where the model does not rotate keys by their position.
    """
    known = _CACHE.setdefault(model, {})
    if by not in known:
        known[by] = _rotations(model, by)
    if path not in known[by]:
        raise UnreadableModel(f"{path} does not rotate its keys by their position as far as could be told.")
    return known[by][path](keys.detach().cpu()).to(keys.device)


def _rotations(model: nn.Module, by: int) -> dict[str, Rotation]:
    if not transformers.rotates(model):
        raise UnreadableModel(f"{type(model).__name__} does not rotate keys by their position.")
    read = anatomy.read(model)
    modules = {s.module: model.get_submodule(s.module) for s in read.sublayers if s.registered}
    angles: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(module: nn.Module, args: Any, kwargs: dict[str, Any], path: str) -> None:
        given = kwargs.get("position_embeddings")
        if isinstance(given, tuple) and len(given) == 2:
            angles[path] = (given[0][0, 0].cpu().double(), given[1][0, 0].cpu().double())

    hooks = [
        module.register_forward_pre_hook(lambda m, a, k, path=path: listen(m, a, k, path), with_kwargs=True)
        for path, module in modules.items()
    ]
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), anatomy.at_rest(model), transformers.without_dropout(model):
            batch = {"input_ids": torch.full((1, 1), 3, device=device)}
            start = transformers.keys_and_values(model, modules, batch, 0)
            end = transformers.keys_and_values(model, modules, batch, by)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for path, (cosine, sine) in angles.items():
        before, after = (calls[path][0][0][0, :, 0].cpu().double() for calls in (start, end))
        rotation = _fitting(before, after, cosine, sine)
        if rotation is not None:
            found[path] = rotation
    return found


def _fitting(before: Tensor, after: Tensor, cosine: Tensor, sine: Tensor) -> Rotation | None:
    """The rotation that takes the keys [heads, width] at one position to those at the other."""
    length = (cosine**2 + sine**2).sqrt()  # some models scale keys in the same step
    cosine, sine = cosine / length, sine / length
    width, given = before.shape[-1], len(cosine)
    candidates = []
    for count, chosen in (
        (given // 2, slice(0, given // 2)),
        (given // 2, slice(0, given, 2)),
        (given, slice(None)),
    ):
        if 2 * count <= width:
            i = torch.arange(count)
            candidates += [
                Rotation(i, i + count, cosine[chosen], sine[chosen]),
                Rotation(2 * i, 2 * i + 1, cosine[chosen], sine[chosen]),
            ]
    errors = [float((rotation(before) - after).norm() / after.norm()) for rotation in candidates]
    best = min(range(len(errors)), key=errors.__getitem__, default=None)
    return None if best is None or errors[best] > _FITS else candidates[best]
