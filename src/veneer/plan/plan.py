"""plan: what training a method on a model takes, counted on the meta device, without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.errors import PlanError, closest
from veneer.formats.nf4_storage import Holder
from veneer.merging import activations_dtype
from veneer.optim.choosing import NAMES
from veneer.plan import presets
from veneer.plan.constants import Constants, constants
from veneer.plan.devices import CUBLAS_WORKSPACE, CUDA_CONTEXT, GIB, MIB, Device
from veneer.plan.devices import device as device_of
from veneer.plan.host import kept, resident
from veneer.plan.tracing import PHASES, SLACK, Counts, Methods, Setting, counts
from veneer.quantizing import NF4
from veneer.seams import loading, transformers

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "dequantization", "overhead")
WINDOW = 64 * MIB
"""Of `PagedAdamW`, on the device."""


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds that it is expected to lie in."""

    low: float
    expected: float
    high: float

    @classmethod
    def of(cls, exact: float) -> Interval:
        """An interval without width."""
        return cls(exact, exact, exact)

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def as_dict(self) -> dict[str, float]:
        """As plain data."""
        return {"low": self.low, "expected": self.expected, "high": self.high}


@dataclass(frozen=True)
class Overhead:
    """What a forward pass takes beyond the base's: the share of its operations on numbers, and calls of kernels."""

    flops: float
    calls: float


@dataclass(frozen=True)
class Plan:
    """What a training step takes; bytes, seconds, and operations on numbers.

    trainable, total: parameters; of the base, `total`. phases: at the highest moment of each phase of a step, what is
    alive by part; memory: the most of each part over the phases; peak: the most of their sums. saved_bytes: what
    autograd keeps for backward, each storage once, parameters and buffers left out. flops: of a step.
    step_seconds: None where the device's rates are not known. adapter_bytes: of the adapter's file, or of the model
    where it trains whole. unmerged, merged: what inference takes beyond the base. setting, optimizer, device: what was
    asked for.
    """

    trainable: int
    total: int
    phases: Mapping[str, Mapping[str, Interval]]
    memory: Mapping[str, Interval]
    peak: Interval
    saved_bytes: int
    flops: float
    step_seconds: Interval | None
    adapter_bytes: int
    unmerged: Overhead
    merged: Overhead
    setting: Setting
    optimizer: str
    device: Device | None
    config: Any
    counted: Mapping[str, float]
    block: Mapping[str, float]

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base."""
        return self.trainable / self.total if self.total else 0.0

    @property
    def highest(self) -> Mapping[str, Interval]:
        """The phase in which most is expected to be alive, by part."""
        return max(self.phases.values(), key=lambda parts: sum(part.expected for part in parts.values()))

    def fits(self, size: int) -> bool | None:
        """Whether so many bytes are enough: True at the upper bound, False below the lower one, None in between."""
        if self.peak.high <= size:
            return True
        return False if self.peak.low > size else None

    def changed(self, counted: Counts | None = None, **options: Any) -> Plan:
        """The plan with other options: those of `plan`, such as batch_size=2 or checkpointing=True.

        `counted` are its counts where they are known; nothing is traced then.
        """
        names = {"batch_size": "batch", "sequence_length": "sequence"}
        optimizer = options.pop("optimizer", self.optimizer)
        setting = replace(self.setting, **{names.get(key, key): value for key, value in options.items()})
        return made(self.config, setting, optimizer, self.device, counted)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        setting = {**vars(self.setting), "optimizer": self.optimizer}
        plain = {key: value if isinstance(value, int | float | None) else str(value) for key, value in setting.items()}
        return {
            "setting": plain,
            "device": self.device.name if self.device else None,
            "trainable": self.trainable,
            "total": self.total,
            "share": self.share,
            "memory": {part: size.as_dict() for part, size in self.memory.items()},
            "phases": {name: {p: i.as_dict() for p, i in parts.items()} for name, parts in self.phases.items()},
            "peak": self.peak.as_dict(),
            "saved_bytes": self.saved_bytes,
            "flops": self.flops,
            "step_seconds": self.step_seconds.as_dict() if self.step_seconds else None,
            "adapter_bytes": self.adapter_bytes,
            "inference": {"unmerged": vars(self.unmerged), "merged": vars(self.merged)},
        }

    def explain(self) -> str:
        """The arithmetic, line by line."""
        s, c = self.setting, self.counted
        lines = [
            f"{s.batch} examples of {s.sequence} tokens, {str(s.dtype).removeprefix('torch.')}"
            + (f", {s.quantization}" if s.quantization else "")
            + (", activations computed again" if s.checkpointing else ""),
            f"parameters: {self.total:,} in the base, {self.trainable:,} train ({self.share:.4%})",
            f"weights: {_mib(c['weights'])}, {_mib(self.block['weights'])} of it in each further period of blocks",
        ]
        if s.method is None:
            lines.append(
                f"activations: {_mib(self.memory['activations'].expected)}, at the highest moment of a forward"
            )
        else:
            one = self.memory["optimizer"].expected
            lines += [
                f"adapter: {_mib(c['adapter'])}; gradients: {_mib(c['gradients'])}, as large as what trains",
                f"optimizer {self.optimizer}: {_mib(one)}",
                f"saved for backward: {_mib(self.saved_bytes)} ({_mib(self.block['saved'])} a period of blocks)",
            ]
        if s.quantization:
            lines.append(f"dequantization: the largest weight made dense, {_mib(c['largest dense'])}")
        for name, parts in self.phases.items():
            whole = sum(part.expected for part in parts.values())
            terms = " + ".join(f"{_mib(part.expected)} {key}" for key, part in parts.items() if part.expected)
            lines.append(f"{name}: {terms} = {_mib(whole)}")
        lines.append(f"peak: {_mib(self.peak.expected)}, between {_mib(self.peak.low)} and {_mib(self.peak.high)}")
        lines.append(f"operations: {self.flops:.4g} in products, {_mib(c.get('moved', c['base moved']))} in and out of")
        lines[-1] += f" the {c.get('calls', c['base calls']):.0f} other calls" if self.flops else ""
        if self.step_seconds and self.device:
            known = constants(self.device)
            lines.append(
                f"step: {self.step_seconds.expected:.3g} s at {known.products:.0%} of {self.device.name}'s rate for "
                f"products, {known.bandwidth:.0%} of its bandwidth, {1e6 * known.call:.1f} µs a call"
            )
        return "\n".join(lines)


def _mib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.2f} MiB"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan(
    model: nn.Module | str | Path | Any,
    method: Methods | str | None = None,
    where: str | None = None,
    *,
    also_train: Sequence[str] = (),
    batch_size: int = 1,
    sequence_length: int = 512,
    dtype: torch.dtype | str | None = None,
    quantization: NF4 | str | None = None,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    loss: str = "whole",
    device: str | Device | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> Plan:
    """Count what a training step takes: memory by part, time, and what is left at inference. No weights are read.

    `model` is a model, a transformers config, a folder or Hub id, or a preset (`llama3.1:8b`). `method`, `where` and
    `also_train` are as in `attach`; "full" trains the model's own weights, where FullFineTuning() keeps them and trains
    float32 copies; None is inference. `dtype` is that of the base: by default the model's own. `quantization` is "nf4"
    or NF4(...). `optimizer` is a name that `veneer.optimizer` knows; `loss` is "whole" or "chunked" (as `chunk_loss`).

    `device` is a name (`rtx-4090`), a size (`24GB`), "auto" for this machine or "cpu"; None counts as for CUDA and
    tells no time. On "cpu" the overhead is this process as it is. The batch has no padding.

    Raises PlanError for a model without token ids, an unknown name or device, and for what cannot be planned.
    """
    config = config_of(model)
    if isinstance(model, nn.Module):
        dtype = dtype or activations_dtype(model)
        holders = [each for each in model.modules() if isinstance(each, Holder)]
        if quantization is None and holders:
            facts = next(iter(holders[0].facts.values()))
            quantization = NF4(facts.block_size, facts.double_quant)
    if isinstance(quantization, str):
        if quantization != "nf4":
            raise PlanError(f"There is no quantization '{quantization}'. Give 'nf4', NF4(...) or None.")
        quantization = NF4()
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise PlanError(f"There is no dtype '{dtype}'. Give {', '.join(DTYPES)}, or torch's own.")
        dtype = DTYPES[dtype]
    if loss not in ("whole", "chunked"):
        raise PlanError(f"There is no loss '{loss}'. Give 'whole' or 'chunked'.")
    if isinstance(method, str) and method != "full":
        raise PlanError(f"There is no method '{method}'. Give 'full', a method such as LoRA(rank=8), or None.")
    if method == "full" and quantization is not None:
        raise PlanError(
            "Weights in four bits cannot be trained themselves. Take an adapter, or leave quantization out."
        )
    if batch_size < 1 or sequence_length < 1:
        raise PlanError(f"A batch of {batch_size} × {sequence_length} has nothing in it. Give at least 1 × 1.")
    found = device_of("auto") if device == "cpu" else device_of(device) if isinstance(device, str) else device
    if device == "cpu" and found is not None and found.kind != "cpu":
        raise PlanError("This machine has an accelerator; its CPU is not planned for. Give auto or a device's name.")
    dtype = dtype or transformers.stored_dtype(config)
    kind = found.kind if found else "cuda"
    setting = Setting(
        method,
        where,
        batch_size,
        sequence_length,
        dtype,
        quantization,
        checkpointing,
        loss,
        kind,
        adapter_dtype,
        tuple(also_train),
    )
    return made(config, setting, optimizer, found)


def config_of(model: Any) -> Any:
    """The config of a model, folder, Hub id or preset."""
    if isinstance(model, nn.Module):
        if not transformers.is_pretrained(model):
            raise PlanError(
                f"{type(model).__name__} is no model of transformers, whose depth can be told. Give a config."
            )
        found: Any = copy.deepcopy(model.config)
        found.architectures = [type(model).__name__]
        return found
    if not isinstance(model, str | Path):
        return model
    name = str(model)
    if (
        not Path(name).exists()
        and "/" not in name
        and name.partition(":")[0] in {n.partition(":")[0] for n in presets.names()}
    ):
        return presets.preset(name)
    return loading.config_of(name, None)


def made(config: Any, setting: Setting, optimizer: str, device: Device | None, counted: Counts | None = None) -> Plan:
    """The plan of a setting, from its counts."""
    if optimizer not in NAMES:
        near = closest(optimizer, NAMES)
        raise PlanError(f"There is no optimizer '{optimizer}'.{near} All: {', '.join(NAMES)}.")
    counted, block = (counted, {}) if counted else counts(config, setting)
    phases = _phases(counted, setting, optimizer)
    memory = {part: _most(phases[name][part] for name in phases) for part in PARTS}
    sums = [sum(parts.values(), Interval.of(0)) for parts in phases.values()]
    flops = counted.get("flops", counted["base flops"])
    before = Overhead(0.0, 0.0)
    if "adapted flops" in counted:
        more = counted["adapted flops"] - counted["base flops"]
        before = Overhead(more / counted["base flops"], counted["adapted calls"] - counted["base calls"])
    return Plan(
        trainable=round(counted["trainable"]),
        total=round(counted["total"]),
        phases=phases,
        memory=memory,
        peak=_most(sums),
        saved_bytes=round(counted.get("saved", 0)),
        flops=flops,
        step_seconds=_seconds(counted, setting, device),
        adapter_bytes=round(counted.get("file", 0)),
        unmerged=before,
        merged=before if counted.get("left") else Overhead(0.0, 0.0),
        setting=setting,
        optimizer=optimizer,
        device=device,
        config=config,
        counted=counted,
        block=block,
    )


def _most(intervals: Any) -> Interval:
    every = list(intervals)
    return Interval(*(max(getattr(one, end) for one in every) for end in ("low", "expected", "high")))


def _phases(counted: Counts, setting: Setting, optimizer: str) -> dict[str, dict[str, Interval]]:
    exact = Interval.of
    always = {"weights": exact(counted["weights"]), "adapter": exact(counted["adapter"])}
    dense = exact(counted["largest dense"])
    if setting.method is None:
        rows = {"forward": {"activations": exact(counted["base activations"]), "dequantization": dense}}
        return {name: _completed(always | parts, counted, setting) for name, parts in rows.items()}
    states, temporary = _states(counted, setting.kind, optimizer)
    always["optimizer"] = exact(states)
    found = {}
    for name in PHASES:
        gradients = counted[f"gradients {name}"]
        alive = max(0.0, counted[f"peak {name}"] - gradients)
        activations = min(alive, counted["kept"]) if name == "loss" else alive
        parts = {
            "gradients": exact(gradients),
            "activations": exact(activations),
            "logits": exact(alive - activations),
            "dequantization": exact(0) if name == "loss" else dense,
        }
        found[name] = _completed(always | parts, counted, setting)
    last = {"gradients": exact(counted["gradients"]), "optimizer": exact(states + temporary)}
    return found | {"update": _completed(always | last, counted, setting)}


def _completed(parts: dict[str, Interval], counted: Counts, setting: Setting) -> dict[str, Interval]:
    """All parts, with what the process, CUDA and the allocator add."""
    if setting.kind == "cpu":
        now = resident()
        expected, most = kept(counted.get("made", 0.0))
        overhead = Interval(now, now + expected, now + most)
    else:
        slack = counted.get(SLACK, 0.0)
        alive = sum(parts[part].expected for part in ("gradients", "activations", "logits") if part in parts)
        most = max(slack, slack * alive / max(counted.get("largest transient", 0.0), 1))
        context = Interval(*CUDA_CONTEXT) if setting.kind == "cuda" else Interval.of(0)
        # The allocator gives unused segments back before it fails, so that slack need not be there.
        overhead = context + Interval.of(2 * CUBLAS_WORKSPACE) + Interval(0, slack, most)
    return {part: parts.get(part, Interval.of(0)) for part in PARTS} | {"overhead": overhead}


def _states(counted: Counts, kind: str, optimizer: str) -> tuple[float, float]:
    """(bytes of states on the device, bytes that a step of the optimizer takes beside them)."""
    trained, largest = counted["gradients"], counted["largest trained"]
    if optimizer == "paged":
        return min(WINDOW, 2 * trained), largest
    if optimizer == "paged-bitsandbytes":
        return counted["unpaged states"], 0.0
    if optimizer == "adamw-8bit":
        return counted["small states"], 0.0
    if optimizer == "flat":  # a buffer for the gradients, too; a CPU takes it in small pieces
        return 3 * trained, 2 * trained if kind == "cuda" else 0.0
    # On a GPU torch takes the square root of all second moments at once; on a CPU it goes tensor by tensor.
    return 2 * trained, trained if kind == "cuda" else 2 * largest


def _seconds(counted: Counts, setting: Setting, device: Device | None) -> Interval | None:
    if device is None or device.bandwidth is None:
        return None
    rate = device.rate(str(setting.dtype).removeprefix("torch."))
    if rate is None:
        return None
    prefix = "base " if setting.method is None else ""
    flops, moved, calls = (counted[f"{prefix}{key}"] for key in ("flops", "moved", "calls"))
    known: Constants = constants(device)

    def at(products: float, bandwidth: float, call: float) -> float:
        return flops / (rate * products) + moved / (device.bandwidth * bandwidth) + calls * call  # type: ignore[operator]

    spread: Callable[[float], float] = lambda by: at(  # noqa: E731
        known.products / by, known.bandwidth / by, known.call * by
    )
    least = max(flops / rate, moved / device.bandwidth) if not known.measured else spread(1 / known.spread)
    return Interval(min(least, spread(1)), spread(1), spread(known.spread))
