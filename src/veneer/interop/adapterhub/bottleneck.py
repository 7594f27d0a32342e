"""Bottleneck adapters as AdapterHub stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.bottleneck import Activation, Placement
from veneer.errors import CorruptFile, FileError, listed
from veneer.handle import Claim
from veneer.interop.adapterhub.common import (
    Layout,
    NotInAdapterHub,
    Role,
    describe,
    left_out,
    refuse,
    refuse_missing,
    sublayers,
    take,
)
from veneer.interop.peft.common import Entry
from veneer.methods import BottleneckAdapter
from veneer.seams import transformers

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu", "tanh": "tanh", "leakyrelu": "leaky_relu",
}  # fmt: skip
_NAMES = {"silu": "swish", "leaky_relu": "leakyrelu"}
Written = tuple[Claim, BottleneckAdapter, Mapping[str, Tensor]]


def read(
    model: nn.Module, layout: Layout, config: dict[str, Any], name: str, tensors: dict[str, Tensor], file: Path
) -> tuple[list[Entry], dict[str, Tensor]]:
    """The bottlenecks of a folder, one entry for each width; what is read is taken out of `tensors`."""
    placement = _placement(config, layout, file)
    named: dict[int, list[tuple[str, None]]] = {}
    own: dict[str, Tensor] = {}
    roles: dict[int, set[str]] = {}
    for (role, layer), place in sublayers(model).items():
        stem = layout.stem(role, layer)
        if not (found := take(tensors, f"{stem}.adapters.{name}.")):
            continue
        parts = _own_bottleneck(found, bool(config.get("ln_before")), file)
        if "down" not in parts:
            raise CorruptFile(f"{file}: the down projection of {stem} is missing.")
        width = len(parts["down"])
        named.setdefault(width, []).append((place.path, None))
        roles.setdefault(width, set()).add(role)
        own |= {f"{place.path}.0.bottleneck.{key}": tensor for key, tensor in parts.items()}
    refuse_missing(named, name, file)
    entries = [
        Entry(_method(config, placement, width, file), " | ".join(sorted(roles[width])), list(at))
        for width, at in named.items()
    ]
    return entries, own


def _placement(config: Mapping[str, Any], layout: Layout, file: Path) -> Placement:
    refuse(
        config,
        {"ln_after": False, "use_gating": False, "phm_layer": False, "inv_adapter": None, "cross_adapter": False},
        file,
    )
    if config.get("is_parallel"):
        if not layout.post_norm:
            raise FileError(f"{file}: AdapterHub's parallel adapter reads before the norm here, Veneer's behind it.")
        return "parallel"
    before = bool(config.get("original_ln_before"))
    kept = config.get("residual_before_ln", True) is True and config.get("original_ln_after", True)
    dropped = not config.get("residual_before_ln", True) and not config.get("original_ln_after", True)
    if not (kept or (before and dropped and not layout.post_norm)):
        raise FileError(
            f"{file}: residual_before_ln={config.get('residual_before_ln')} with "
            f"original_ln_after={config.get('original_ln_after')} is nothing that Veneer has on such a model."
        )
    return "after_residual" if before else "serial"


def _method(config: Mapping[str, Any], placement: Placement, width: int, file: Path) -> BottleneckAdapter:
    activation = _ACTIVATIONS.get(str(config.get("non_linearity")).lower())
    if activation is None:
        raise FileError(f"{file}: non_linearity={config.get('non_linearity')} is none of {listed(_ACTIVATIONS, 9)}.")
    return BottleneckAdapter(
        width=width,
        placement=placement,
        activation=activation,
        dropout=float(config.get("dropout", 0.0)),
        scaling=config.get("scaling", 1.0),
        norm=bool(config.get("ln_before")),
    )


def _own_bottleneck(found: dict[str, Tensor], norm: bool, file: Path) -> dict[str, Tensor]:
    """A bottleneck under Veneer's names. Its norm lies in the file twice."""
    names = {
        f"adapter_down.{int(norm)}.weight": "down", f"adapter_down.{int(norm)}.bias": "down_bias",
        "adapter_up.weight": "up", "adapter_up.bias": "up_bias", "scaling": "scale",
        "adapter_norm_before.weight": "norm_weight", "adapter_norm_before.bias": "norm_bias",
    }  # fmt: skip
    if norm:
        found = {key: tensor for key, tensor in found.items() if not key.startswith("adapter_down.0.")}
    if odd := found.keys() - names.keys():
        raise CorruptFile(f"{file}: {listed(sorted(odd))} is no part of an adapter with this config.")
    return {names[key]: tensor for key, tensor in found.items()}


def write(
    model: nn.Module, layout: Layout, claims: Sequence[Written], name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and config of bottlenecks; NotInAdapterHub where they do not all have the same options."""
    at = {place.path: key for key, place in sublayers(model).items()}
    tensors: dict[str, Tensor] = {}
    widths: dict[tuple[Role, int], int] = {}
    for claim, method, own in claims:
        if claim.place.path not in at or at[claim.place.path] in widths:
            raise NotInAdapterHub(f"it has one bottleneck a sublayer, and not at {claim.place.path}")
        role, layer = at[claim.place.path]
        stem = f"{(layout.attention if role == 'attention' else layout.mlp).format(layer)}.adapters.{name}"
        down, up = own["down"], own["up"]
        widths[role, layer] = len(down)
        step = int(method.norm)
        tensors |= {
            f"{stem}.adapter_down.{step}.weight": down,
            f"{stem}.adapter_down.{step}.bias": own.get("down_bias", down.new_zeros(len(down))),
            f"{stem}.adapter_up.weight": up,
            f"{stem}.adapter_up.bias": own.get("up_bias", up.new_zeros(len(up))),
        }
        if "scale" in own:
            tensors[f"{stem}.scaling"] = own["scale"]
        if method.norm:
            for end, key in {"weight": "norm_weight", "bias": "norm_bias"}.items():
                tensors |= {f"{stem}.adapter_norm_before.{end}": own[key], f"{stem}.adapter_down.0.{end}": own[key]}
    options = {(one.placement, one.activation, one.dropout, one.scaling, one.norm) for _, one, _ in claims}
    if len(options) > 1:
        raise NotInAdapterHub("its bottlenecks have one placement, activation, dropout, scaling and norm")
    method = claims[0][1]
    if method.placement == "parallel" and not layout.post_norm:
        raise NotInAdapterHub("its parallel adapter reads before the norm on such a model, Veneer's behind it")
    config = {
        "architecture": None,
        "dropout": method.dropout,
        "is_parallel": method.placement == "parallel",
        "ln_before": method.norm,
        "mh_adapter": any(role == "attention" for role, _ in widths),
        "non_linearity": _NAMES.get(method.activation, method.activation),
        "original_ln_after": True,
        "original_ln_before": method.placement == "after_residual",
        "output_adapter": any(role == "mlp" for role, _ in widths),
        "reduction_factor": _reduction(widths, transformers.width(model)),
        "residual_before_ln": True,
        "scaling": method.scaling,
        "leave_out": left_out(model, widths),
    }
    return tensors, describe(model, name, config)


def _reduction(widths: Mapping[tuple[Role, int], int], outer: int) -> float | dict[str, float]:
    """The factors that give these widths: AdapterHub takes the whole part of outer / factor."""
    by_layer: dict[int, int] = {}
    for (_, layer), width in widths.items():
        if by_layer.setdefault(layer, width) != width:
            raise NotInAdapterHub("its bottlenecks have one width in a layer")
    factors = {
        width: outer / width if outer // (outer / width) == width else outer / (width + 0.5)
        for width in by_layer.values()
    }
    if len(factors) == 1:
        return next(iter(factors.values()))
    return {str(layer): factors[width] for layer, width in by_layer.items()}
