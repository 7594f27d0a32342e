"""AdapterHub's folders: bottleneck adapters, prefixes, LoRA, and fusions of bottleneck adapters.

`adapter_config.json` describes the method, `adapter.safetensors` (or the pickle `pytorch_adapter.bin`, which is read
with weights_only=True) holds the tensors under the names that AdapterHub's own modules have in its model classes. Those
names are known here for the families of `LAYOUTS`. A fusion is `adapter_fusion_config.json` and
`model_adapter_fusion.safetensors`; its parts are folders of their own, within it or beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from veneer import files, places
from veneer.bottleneck import Activation, Placement
from veneer.delta import Method, Place
from veneer.errors import CorruptFile, FileError, UnsafeFile, WrongModel, listed
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry
from veneer.lowrank import Pair
from veneer.methods import AdapterFusion, BottleneckAdapter, DoRA, LoRA, LoRAFA, PrefixTuning
from veneer.seams import transformers
from veneer.slots import Slots

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
FUSION_CONFIG = "adapter_fusion_config.json"
FUSION_TENSORS, FUSION_PICKLE = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
FILES = (CONFIG, TENSORS, PICKLE, FUSION_CONFIG, FUSION_TENSORS, FUSION_PICKLE)
VERSION = "adapters.1.3.0"
"""The version whose files these are."""

Role = Literal["attention", "mlp"]
_ROLES: tuple[Role, ...] = ("attention", "mlp")
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu", "tanh": "tanh", "leakyrelu": "leaky_relu",
}  # fmt: skip
_NAMES = {"silu": "swish", "leaky_relu": "leakyrelu"}


@dataclass(frozen=True)
class Layout:
    """Where AdapterHub keeps its modules in one family; {} is the number of the layer."""

    attention: str
    mlp: str
    linears: Mapping[str, str]
    """The linears that its LoRA knows, by its own names for them."""
    post_norm: bool = False
    """Whether the norm follows the residual add; elsewhere its parallel adapter reads before the norm, ours behind."""


_BERT = Layout(
    "encoder.layer.{}.attention.output",
    "encoder.layer.{}.output",
    {
        "q": "encoder.layer.{}.attention.self.query",
        "k": "encoder.layer.{}.attention.self.key",
        "v": "encoder.layer.{}.attention.self.value",
        "intermediate": "encoder.layer.{}.intermediate.dense",
        "output": "encoder.layer.{}.output.dense",
    },
    post_norm=True,
)
_LLAMA = Layout(
    "layers.{}.attention_adapters",
    "layers.{}.output_adapters",
    {
        "q": "layers.{}.self_attn.q_proj",
        "k": "layers.{}.self_attn.k_proj",
        "v": "layers.{}.self_attn.v_proj",
        "intermediate": "layers.{}.mlp.down_proj",  # so it is, and "output" the other one
        "output": "layers.{}.mlp.up_proj",
    },
)
_GPT2 = Layout(
    "h.{}.attention_adapters",
    "h.{}.output_adapters",
    {"intermediate": "h.{}.mlp.c_fc", "output": "h.{}.mlp.c_proj"},
)
LAYOUTS = {
    "bert": _BERT, "electra": _BERT, "roberta": _BERT, "xlm-roberta": _BERT,
    "gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA,
}  # fmt: skip


class NotInAdapterHub(Exception):
    """AdapterHub has no folder for this adapter; the message says why."""


@dataclass(frozen=True)
class Found:
    """What a folder means on a model: methods at places, and their tensors under Veneer's keys."""

    entries: list[Entry]
    tensors: dict[str, Tensor]
    base: dict[str, str]
    file: Path


def recognises(path: Path) -> bool:
    """Whether a folder is AdapterHub's; PEFT's config has the same name, and a `peft_type`."""
    if (path / FUSION_CONFIG).exists():
        return True
    return (path / CONFIG).exists() and "config" in files.read_json(path / CONFIG)


def read(model: nn.Module, path: Path) -> Found:
    """The entries and tensors of a folder; FileError for what Veneer has not, CorruptFile for what is left over."""
    if (path / FUSION_CONFIG).exists():
        return _read_fusion(model, path)
    described = files.read_json(path / CONFIG)
    layout = _layout(model, path)
    config, name, file = _config(described, path / CONFIG), str(described.get("name")), path / CONFIG
    tensors, source = _tensors(path, TENSORS, PICKLE, model)
    kind = config.get("architecture")
    readers = {None: _read_bottlenecks, "prefix_tuning": _read_prefix, "lora": _read_lora}
    if kind not in readers:
        raise FileError(f"{file} holds '{kind}'; Veneer reads AdapterHub's bottleneck, prefix_tuning, lora and fusion.")
    entries, own = readers[kind](model, layout, config | {"version": described.get("version")}, name, tensors, file)
    if tensors:
        raise CorruptFile(
            f"{source}: {listed(sorted(tensors))} left over. They do not belong to this config and model."
        )
    base = {"class": str(described.get("model_class", "")), "name_or_path": str(described.get("model_name") or "")}
    return Found(entries, own, base, source)


def _layout(model: nn.Module, path: Path) -> Layout:
    kind = transformers.describe(model).get("model_type", type(model).__name__)
    if kind not in LAYOUTS:
        raise FileError(f"{path}: AdapterHub's names are known here for {listed(LAYOUTS, 9)}, not for {kind}.")
    return LAYOUTS[kind]


def _config(described: Mapping[str, Any], file: Path) -> dict[str, Any]:
    config = described.get("config")
    if not isinstance(config, dict):
        raise FileError(f"{file}: config is {config!r}; only folders that carry their whole configuration are read.")
    return config


def _tensors(path: Path, safe: str, pickle: str, model: nn.Module) -> tuple[dict[str, Tensor], Path]:
    """The tensors under the names they have in the bare model, and the file that they come from."""
    if (path / safe).exists():
        file, found = path / safe, files.read_tensors(path / safe)
    elif (path / pickle).exists():
        file = path / pickle
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch meets in a file that is no plain state dict
            raise UnsafeFile(f"{file} is no plain state dict, so reading it could run code: {error}") from None
        if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
            raise CorruptFile(f"{file} holds something else than tensors by name.")
        if broken := [key for key, tensor in found.items() if not torch.isfinite(tensor).all()]:
            raise CorruptFile(f"{file}: {listed(broken)} holds NaN or infinite numbers. Use an earlier save.")
    else:
        raise FileError(f"{path} holds neither {safe} nor {pickle}.")
    prefix = transformers.base_prefix_name(model)
    return {key.removeprefix(f"{prefix}.") if prefix else key: tensor for key, tensor in found.items()}, file


def _take(tensors: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    """What lies below a name, taken out."""
    keys = [key for key in tensors if key.startswith(stem)]
    return {key.removeprefix(stem): tensors.pop(key) for key in keys}


def _sublayers(model: nn.Module) -> dict[tuple[Role, int], Place]:
    """Attention and MLP of every layer; FileError where a layer has several."""
    found: dict[tuple[Role, int], Place] = {}
    for role in _ROLES:
        for place in places.find(model, role, "sublayer"):
            if (role, place.layer) in found:
                raise FileError(
                    f"Layer {place.layer} of {type(model).__name__} has two of {role}; such models are not read."
                )
            found[role, place.layer] = place
    return found


def _refuse(config: Mapping[str, Any], plain: Mapping[str, Any], file: Path) -> None:
    """Options that change what is computed and that Veneer does not have."""
    if odd := [f"{key}={config[key]}" for key, usual in plain.items() if config.get(key, usual) != usual]:
        raise FileError(f"{file}: {listed(odd)} is nothing that Veneer has.")


# ---- bottleneck


def _placement(config: Mapping[str, Any], layout: Layout, file: Path) -> Placement:
    _refuse(
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


def _read_bottlenecks(
    model: nn.Module, layout: Layout, config: dict[str, Any], name: str, tensors: dict[str, Tensor], file: Path
) -> tuple[list[Entry], dict[str, Tensor]]:
    placement = _placement(config, layout, file)
    named: dict[int, list[tuple[str, None]]] = {}
    own: dict[str, Tensor] = {}
    roles: dict[int, set[str]] = {}
    for (role, layer), place in _sublayers(model).items():
        stem = (layout.attention if role == "attention" else layout.mlp).format(layer)
        if not (found := _take(tensors, f"{stem}.adapters.{name}.")):
            continue
        parts = _own_bottleneck(found, bool(config.get("ln_before")), file)
        if "down" not in parts:
            raise CorruptFile(f"{file}: the down projection of {stem} is missing.")
        width = len(parts["down"])
        named.setdefault(width, []).append((place.path, None))
        roles.setdefault(width, set()).add(role)
        own |= {f"{place.path}.0.bottleneck.{key}": tensor for key, tensor in parts.items()}
    _refuse_missing(named, name, file)
    entries = [
        Entry(_method(config, placement, width, file), " | ".join(sorted(roles[width])), list(at))
        for width, at in named.items()
    ]
    return entries, own


def _refuse_missing(found: object, name: str, file: Path) -> None:
    if not found:
        raise WrongModel(f"{file}: the model has no layer that the tensors of '{name}' belong to.")


# ---- prefix


def _read_prefix(
    model: nn.Module, layout: Layout, config: dict[str, Any], name: str, tensors: dict[str, Tensor], file: Path
) -> tuple[list[Entry], dict[str, Tensor]]:
    _refuse(config, {"use_gating": False}, file)
    left_out = set(config.get("leave_out") or ())
    found = [place for place in places.find(model, "attention", "attention") if place.layer not in left_out]
    # every layer holds the same pool of prefixes, so pickles name each tensor once more for each layer
    stem = re.compile(rf"(.*\.)?prefix_tuning(\.pool)?\.prefix_tunings\.{re.escape(name)}\.\w+\.")
    parts = {stem.sub("", key): tensors.pop(key) for key in list(tensors) if stem.match(key)}
    length = int(config.get("prefix_length", 0))
    if config.get("flat") and "control_trans" in parts:
        flat = parts["control_trans"]
    elif {"wte.weight", "control_trans.0.weight", "control_trans.2.weight"} <= parts.keys():
        activation = str(config.get("non_linearity")).lower()
        if activation != "tanh":
            raise FileError(f"{file}: non_linearity={activation} of a prefix's network is not read; only tanh is.")
        inner = nn.functional.linear(
            parts["wte.weight"], parts["control_trans.0.weight"], parts["control_trans.0.bias"]
        )
        flat = nn.functional.linear(inner.tanh(), parts["control_trans.2.weight"], parts["control_trans.2.bias"])
    else:
        raise CorruptFile(f"{file}: a prefix's tensors are missing; there are {listed(sorted(parts))}.")
    own: dict[str, Tensor] = {}
    if not found or flat.numel() % (length * 2 * len(found) * found[0].shape[0] or 1):
        raise WrongModel(f"{file}: {flat.numel()} numbers are no prefix of {length} at {len(found)} attentions.")
    both = flat.reshape(length, 2 * len(found), found[0].shape[0], -1).permute(1, 2, 0, 3)
    for place, key, value in zip(found, both[::2], both[1::2], strict=True):
        own |= {f"{place.path}.0.key": key, f"{place.path}.0.value": value}
    return [Entry(PrefixTuning(length=length), "attention", [(place.path, None) for place in found])], own


# ---- LoRA


def _read_lora(
    model: nn.Module, layout: Layout, config: dict[str, Any], name: str, tensors: dict[str, Tensor], file: Path
) -> tuple[list[Entry], dict[str, Tensor]]:
    plain = {"composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None}
    _refuse(config, plain, file)
    rank, alpha = int(config["r"]), float(config["alpha"])
    version = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", str(config.get("version")))
    if version and (int(version[1]), int(version[2])) < (1, 1):
        alpha = float(rank)  # those versions scaled by nothing, whatever alpha said
    prefix = transformers.base_prefix(model)
    known = [path.format(layer) for path in layout.linears.values() for layer in range(_depth(model))]
    at, own = [], dict[str, Tensor]()
    for path in known:
        found = _take(tensors, f"{path}.loras.{name}.")
        if not found:
            continue
        if found.keys() != {"lora_A", "lora_B"}:
            raise CorruptFile(f"{file}: {path} has {listed(sorted(found))}, not one lora_A and lora_B.")
        at.append((prefix + path, None))
        own |= {f"{prefix}{path}.0.A": found["lora_A"], f"{prefix}{path}.0.B": found["lora_B"]}
    _refuse_missing(at, name, file)
    method = LoRA(rank=rank, alpha=alpha, dropout=float(config.get("dropout", 0.0)))
    return [Entry(method, " | ".join(path for path, _ in at), list(at))], own


def _depth(model: nn.Module) -> int:
    return 1 + max(layer for _, layer in _sublayers(model))


# ---- fusion


def _read_fusion(model: nn.Module, path: Path) -> Found:
    file = path / FUSION_CONFIG
    described = files.read_json(file)
    layout, config = _layout(model, path), _config(described, file)
    plain = {"key": True, "query": True, "query_before_ln": False, "residual_before": False, "temperature": False}
    _refuse(config, plain, file)
    name = str(described.get("name"))
    names = described.get("adapter_names") or name.split(",")
    parts = {part: read(model, _part(path, part)) for part in names}
    tensors, source = _tensors(path, FUSION_TENSORS, FUSION_PICKLE, model)
    own: dict[str, Tensor] = {}
    stems = {
        place.path: (layout.attention if role == "attention" else layout.mlp).format(layer)
        for (role, layer), place in _sublayers(model).items()
    }
    groups: list[tuple[AdapterFusion, list[tuple[str, None]]]] = []
    for place_path in [at for entry in parts[names[0]].entries for at, _ in entry.places]:
        found = _take(tensors, f"{stems[place_path]}.adapter_fusion_layer.{name}.")
        if not {"query.weight", "query.bias", "key.weight"} <= found.keys():
            raise CorruptFile(f"{source}: the query and key at {stems[place_path]} are missing.")
        value = found.get("value.weight")
        method = AdapterFusion(
            parts={part: _at(one, place_path, part) for part, one in parts.items()},
            regularization=0.01 if config.get("regularization") else 0.0,
        )
        for known, places_ in groups:
            if known == method:
                places_.append((place_path, None))
                break
        else:
            groups.append((method, [(place_path, None)]))
        stem = f"{place_path}.0"
        own |= {
            f"{stem}.query": found["query.weight"],
            f"{stem}.query_bias": found["query.bias"],
            f"{stem}.key": found["key.weight"],
            f"{stem}.value": torch.eye(len(found["query.weight"])) if value is None else value,
        }
        for part, one in parts.items():
            below = f"{place_path}.0.bottleneck."
            mine = {key: tensor for key, tensor in one.tensors.items() if key.startswith(below)}
            own |= {f"{stem}.parts.{part}.{key.removeprefix(below)}": tensor for key, tensor in mine.items()}
    if tensors:
        raise CorruptFile(f"{source}: {listed(sorted(tensors))} left over. They do not belong to the parts' places.")
    entries = [Entry(method, "mlp", list(at)) for method, at in groups]
    base = {"class": str(described.get("model_class", "")), "name_or_path": str(described.get("model_name") or "")}
    return Found(entries, own, base, source)


def _part(path: Path, part: str) -> Path:
    for folder in (path / part, path.parent / part):
        if (folder / CONFIG).exists():
            return folder
    raise FileError(f"{path} is a fusion of '{part}', which lies neither in it nor beside it. Put its folder there.")


def _at(part: Found, place: str, name: str) -> Method:
    for entry in part.entries:
        if any(path == place for path, _ in entry.places):
            return entry.method
    raise FileError(f"{part.file}: the part '{name}' has nothing at {place}, where another part of its fusion stands.")


# ---- writing


def to_files(adapter: Adapter) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """By folder within (empty: itself) the tensors and config of an adapter; NotInAdapterHub where it has no such."""
    model = adapter.model
    kind = transformers.describe(model).get("model_type", type(model).__name__)
    if kind not in LAYOUTS:
        raise NotInAdapterHub(f"its names are known here for {listed(LAYOUTS, 9)}, not for {kind}")
    layout = LAYOUTS[kind]
    methods = {type(claim.method) for claim in adapter.claims}
    name = re.sub(r"\W", "_", adapter.name)
    if methods == {BottleneckAdapter}:
        own = [(one, cast(BottleneckAdapter, one.method), dict(one.delta.state_dict())) for one in adapter.claims]
        stripped = [
            (one, way, {k.removeprefix("bottleneck."): t for k, t in tensors.items()}) for one, way, tensors in own
        ]
        return {"": _bottleneck_files(model, layout, stripped, name)}
    if methods == {PrefixTuning}:
        return {"": _prefix_files(model, adapter.claims, name)}
    if methods <= {LoRA, LoRAFA} and not adapter.also_train:
        return {"": _lora_files(model, layout, adapter.claims, name)}
    if methods == {AdapterFusion}:
        return _fusion_files(model, layout, adapter.claims)
    raise NotInAdapterHub(f"it has no {listed(sorted(one.__name__ for one in methods))} in one adapter")


def _described(model: nn.Module, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    base = transformers.describe(model)
    return {
        "config": dict(config),
        "hidden_size": transformers.width(model),
        "model_class": base["class"],
        "model_name": base.get("name_or_path") or None,
        "model_type": base["model_type"],
        "name": name,
        "version": VERSION,
    }


Written = tuple[Claim, BottleneckAdapter, Mapping[str, Tensor]]


def _bottleneck_files(
    model: nn.Module, layout: Layout, claims: Sequence[Written], name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    at = {place.path: key for key, place in _sublayers(model).items()}
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
        "leave_out": _left_out(model, widths),
    }
    return tensors, _described(model, name, config)


def _left_out(model: nn.Module, at: Iterable[tuple[str, int]]) -> list[int]:
    """The layers without anything; NotInAdapterHub where the others do not all have the same."""
    roles: dict[int, set[str]] = {}
    for role, layer in at:
        roles.setdefault(layer, set()).add(role)
    if len({frozenset(one) for one in roles.values()}) > 1:
        raise NotInAdapterHub("it stands at the same places of every layer that it does not leave out")
    return [layer for layer in range(_depth(model)) if layer not in roles]


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


def _prefix_files(model: nn.Module, claims: Sequence[Claim], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    slots = [claim.delta for claim in claims if isinstance(claim.delta, Slots)]
    if len({one.key.shape for one in slots} | {one.value.shape for one in slots}) > 1 or len(slots) < len(claims):
        raise NotInAdapterHub("its prefixes have keys and values of one shape at every layer")
    layers = [claim.place.layer for claim in claims]
    if layers != sorted(set(layers)):
        raise NotInAdapterHub("it has one prefix a layer, in their order")
    parts = [tensor.detach() for one in slots for tensor in (one.key, one.value)]
    flat = torch.stack(parts).permute(2, 0, 1, 3).flatten()
    config = {
        "architecture": "prefix_tuning",
        "flat": True,
        "leave_out": [layer for layer in range(_depth(model)) if layer not in layers],
        "prefix_length": slots[0].key.shape[1],
    }
    where = "self_prefix"
    return {f"prefix_tuning.prefix_tunings.{name}.{where}.control_trans": flat}, _described(model, name, config)


def _lora_files(
    model: nn.Module, layout: Layout, claims: Sequence[Claim], name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    prefix = transformers.base_prefix(model)
    known = {
        prefix + path.format(layer): (kind, layer)
        for kind, path in layout.linears.items()
        for layer in range(_depth(model))
    }
    tensors: dict[str, Tensor] = {}
    at: list[tuple[str, int]] = []
    scales: set[tuple[int, float, float]] = set()
    for claim in claims:
        pair, place = claim.delta, claim.place
        if place.path not in known or known[place.path] in at or place.spans or isinstance(claim.method, DoRA):
            raise NotInAdapterHub(f"it has no LoRA on {place.path}; it knows {listed(layout.linears, 9)}")
        assert isinstance(pair, Pair)
        assert isinstance(claim.method, LoRA)
        if len(pair.parts()) > 1:
            raise NotInAdapterHub("it cannot subtract a start such as PiSSA's; bring it to plain LoRA with lora_rank")
        at.append(known[place.path])
        scales.add((len(pair.A), pair.scale, claim.method.dropout))
        stem = f"{place.path.removeprefix(prefix)}.loras.{name}"
        tensors |= {f"{stem}.lora_A": pair.A.detach(), f"{stem}.lora_B": pair.B.detach()}
    if len(scales) > 1:
        raise NotInAdapterHub("its LoRAs have one rank, scale and dropout")
    (rank, scale, dropout) = scales.pop()
    kinds = {kind for kind, _ in at}
    config = {
        "architecture": "lora",
        "alpha": scale * rank,
        "attn_matrices": sorted(kinds & {"q", "k", "v"}),
        "dropout": dropout,
        "intermediate_lora": "intermediate" in kinds,
        "leave_out": _left_out(model, at),
        "output_lora": "output" in kinds,
        "r": rank,
        "selfattn_lora": bool(kinds & {"q", "k", "v"}),
    }
    return tensors, _described(model, name, config)


def _fusion_files(
    model: nn.Module, layout: Layout, claims: Sequence[Claim]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    at = {place.path: key for key, place in _sublayers(model).items()}
    names = sorted(cast(AdapterFusion, claims[0].method).parts)
    fused = ",".join(names)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[Written]] = {name: [] for name in names}
    for claim in claims:
        method, own = cast(AdapterFusion, claim.method), dict(claim.delta.state_dict())
        if sorted(method.parts) != names or not all(
            isinstance(one, BottleneckAdapter) for one in method.parts.values()
        ):
            raise NotInAdapterHub("it fuses the same plain bottleneck adapters everywhere")
        role, layer = at[claim.place.path]
        stem = f"{(layout.attention if role == 'attention' else layout.mlp).format(layer)}.adapter_fusion_layer.{fused}"
        tensors |= {
            f"{stem}.query.weight": own["query"],
            f"{stem}.query.bias": own["query_bias"],
            f"{stem}.key.weight": own["key"],
            f"{stem}.key.bias": own["query_bias"].new_zeros(len(own["key"])),
            f"{stem}.value.weight": own["value"],
        }
        for name in names:
            below = f"parts.{name}."
            mine = {key.removeprefix(below): tensor for key, tensor in own.items() if key.startswith(below)}
            parts[name].append((claim, cast(BottleneckAdapter, method.parts[name]), mine))
    config = {
        "key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True,
        "residual_before": False, "temperature": False, "value_before_softmax": True, "value_initialized": True,
        "dropout_prob": None,
    }  # fmt: skip
    described = _described(model, fused, config) | {"adapter_names": names}
    written = {name: _bottleneck_files(model, layout, group, name) for name, group in parts.items()}
    return {"": (tensors, described), **written}
