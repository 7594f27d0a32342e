"""The counts of one training step and of one forward pass of a model without weights, for a model of any depth.

Models of a few blocks are built on the meta device and do what the real one does; what is between two depths is one
block of each kind, so all other depths follow exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from veneer.adapter import attach
from veneer.collecting import uncollected
from veneer.counting import count_parameters
from veneer.delta import Method
from veneer.errors import PlanError, UnreadableModel
from veneer.formats.nf4_storage import Holder
from veneer.methods import PromptTuning
from veneer.ops import nf4_kernels
from veneer.ops.loss import chunk_length, summed_cross_entropy
from veneer.optim.choosing import PAGED_FROM
from veneer.plan.devices import CUDA_ALLOCATOR, Allocator
from veneer.plan.live import Live, cpu_attention, fused_attention, held, reserved
from veneer.quantizing import NF4, quantize
from veneer.seams import anatomy, loading, transformers
from veneer.seams.checkpointing import checkpoint_activations
from veneer.seams.depths import Depth, depths, shallow
from veneer.seams.quiet import quiet

Methods = Method | tuple[Method, ...] | Mapping[str, Any]
Counts = dict[str, float]
HOST_ALLOCATOR = Allocator(block=1)
"""What a CPU's allocator adds to a tensor's bytes is too little to count."""
MAPPED = 32 * 2**20
"""From this size on glibc's malloc maps memory and gives it back when it is freed; what is smaller lies in its heap."""
SLACK = "largest slack"
"""Bytes that the allocator takes beside what is alive, of the deepest model that is built."""
PHASES = ("forward", "loss", "last block", "first block")
"""Of forward and backward, in order; each has its own highest moment. The optimizer's step follows."""


@dataclass(frozen=True)
class Setting:
    """All that the counts of a step depend on, beside the model. method: "full" trains the model's own weights.

    also_train: as in `attach`.
    """

    method: Methods | str | None
    where: str | None
    batch: int
    sequence: int
    dtype: torch.dtype
    quantization: NF4 | None
    checkpointing: bool
    loss: str
    kind: str
    adapter_dtype: torch.dtype | None
    also_train: tuple[str, ...] = ()


@uncollected()
def counts(config: Any, setting: Setting) -> tuple[Counts, Mapping[str, float]]:
    """(counts at full depth, what one more period of blocks adds), from builds of each stack at two depths."""
    stacks = depths(config)
    few = {stack: stack.few for stack in stacks}
    base = _counted(config, few, setting)
    total, block = dict(base), dict.fromkeys(base, 0.0)
    for stack in stacks:
        if stack.steps:
            more = _counted(config, few | {stack: stack.more}, setting)
            for key in base:
                added = more[key] - base[key]
                if key.startswith("largest"):
                    total[key], added = max(total[key], more[key]), 0.0
                total[key] += added * stack.steps
                block[key] += added
    if block.get("made"):
        total["made"] = block["made"]  # however many blocks there are: what one leaves in malloc's heap, the next takes
    return total, block


_ANATOMIES: dict[str, anatomy.Anatomy] = {}
_KNOWN: dict[str, Counts] = {}
_FORWARDS: dict[str, Counts] = {}


def _counted(config: Any, chosen: Mapping[Depth, int], setting: Setting) -> Counts:
    key = f"{config.to_json_string(use_diff=False)} {sorted((d.names, n) for d, n in chosen.items())} {setting}"
    if key not in _KNOWN:
        with quiet():
            _KNOWN[key] = _count(shallow(config, chosen), setting)
    return dict(_KNOWN[key])


def build(config: Any, setting: Setting) -> Any:
    """The base on the meta device, in its dtype and packed where that is asked for."""
    model: Any = loading.without_weights(config, loading.class_of(config)).to(setting.dtype)
    key = config.to_json_string(use_diff=False)
    if key in _ANATOMIES:
        anatomy.adopt(model, _ANATOMIES[key])
    else:
        with suppress(UnreadableModel):  # which what needs it says
            _ANATOMIES[key] = anatomy.read(model)
    if setting.quantization is not None:
        quantize(model, setting.quantization)
    return model


def train_by(model: Any, setting: Setting) -> Any:
    """Make ready for training, and return the adapter, where the method has one."""
    adapter = None
    if setting.method == "full":
        model.requires_grad_(True)
    elif not isinstance(setting.method, str | None):
        adapter = attach(
            model, setting.method, setting.where, also_train=setting.also_train, dtype=setting.adapter_dtype
        )
    if setting.checkpointing:
        checkpoint_activations(model)
    model.train()
    return adapter


def _count(config: Any, setting: Setting) -> Counts:
    model = build(config, setting)
    if not transformers.accepts(model, "input_ids"):
        raise PlanError(f"{type(model).__name__} takes no token ids, and only steps on those are planned.")
    base = held(model)
    found: Counts = {
        "total": count_parameters(model).total,
        "weights": sum(t.nbytes for t in {id(t): t for t in base}.values()),
        "largest dense": _largest(model, setting),
    }
    model.eval()
    # What an adapter adds to a forward is a share of the base's, and the same for one example as for many.
    one = replace(setting, checkpointing=False, batch=setting.batch if setting.method is None else 1)
    with _attention(setting):
        found |= _forward("base", model, replace(one, method=None, where=None, also_train=()))
        if setting.method is None:
            return found | {"trainable": 0, "adapter": 0}
        adapter = train_by(model, setting)
        if adapter is not None:
            model.eval()
            found |= _forward("adapted", model, one)
            found["left"] = sum(not claim.delta.mergeable for claim in adapter.claims)
            found["sites"] = len(adapter.claims)
            model.train()
        trained = list({id(p): p for p in model.parameters() if p.requires_grad}.values())
        own = {id(tensor) for tensor in base}
        added = {id(tensor): tensor for tensor in held(model) if id(tensor) not in own}
        found["adapter"] = sum(tensor.nbytes for tensor in added.values())
        found["file"] = sum(p.nbytes for p in (trained if adapter is None else adapter.parameters()))
        found["trainable"] = sum(p.numel() for p in trained)
        found["gradients"] = sum(p.nbytes for p in trained)
        found["largest trained"] = max((p.nbytes for p in trained), default=0)
        found["small states"] = sum(_eight_bits(p) for p in trained)
        found["unpaged states"] = sum(2 * p.nbytes for p in trained if p.numel() < PAGED_FROM)
        found |= _step(model, setting, trained)
    return found


def _largest(model: nn.Module, setting: Setting) -> int:
    """Bytes of the largest packed weight, made dense: of a stack one matrix, and in C on a CPU a few rows of one."""
    shapes = [facts.shape[-2:] for m in model.modules() if isinstance(m, Holder) for facts in m.facts.values()]
    largest = max(map(math.prod, shapes), default=0)
    if setting.kind == "cpu" and nf4_kernels.chosen("cpu", setting.dtype) == "c":
        largest = min(largest, nf4_kernels.PIECE * torch.get_num_threads())
    return largest * setting.dtype.itemsize


def _eight_bits(parameter: Tensor) -> float:
    """bitsandbytes' two moments: 8 bits and a float32 for 256 of them, but 32 bits in small tensors."""
    return parameter.numel() * (2 * (1 + 4 / 256) if parameter.numel() >= 4096 else 8)


def _attention(setting: Setting) -> AbstractContextManager[None]:
    return cpu_attention() if setting.kind == "cpu" else fused_attention()


class _Counting(Live):
    """Live, and what the operations take: operations on numbers in products, bytes in and out of all others, calls."""

    def __init__(self, kind: str) -> None:
        super().__init__(HOST_ALLOCATOR if kind == "cpu" else CUDA_ALLOCATOR)
        self.moved = self.calls = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.is_view:
            return out
        packet = func._overloadpacket
        self.calls += 1
        if packet is torch.ops.veneer.nf4_product:
            self.flops += 2.0 * args[0].numel() * math.prod(args[3]) / args[3][0 if args[-1] else 1]
        elif packet in (torch.ops.veneer.nf4_grouped, torch.ops.veneer.grouped_product):
            self.flops += 2.0 * args[0].numel() * out.shape[-1]
        elif packet in (torch.ops.veneer.grouped_outer, torch.ops.aten._grouped_mm):
            self.flops += 2.0 * args[0].numel() * args[1].shape[-1]
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += 10.0 * args[1].numel() * args[2].shape[-2]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        else:
            tensors = [*args, *(out if isinstance(out, tuple | list) else (out,))]
            self.moved += sum(each.nbytes for each in tensors if isinstance(each, Tensor))
        return out


def inputs(config: Any, setting: Setting) -> dict[str, Tensor]:
    """A batch without padding, cut so that what a prompt puts in front has positions, too."""
    length = setting.sequence
    positions = transformers.positions(config)
    if positions is not None and isinstance(setting.method, PromptTuning):
        length -= max(0, length + setting.method.length - positions)
    if length < 1:
        raise PlanError(f"A prompt of {setting.method} leaves no position of {positions} for a sequence.")
    if positions is not None and length > positions:
        raise PlanError(f"A sequence of {length} is longer than the model's {positions} positions. Plan a shorter one.")
    ids = torch.ones(setting.batch, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(model: Any, batch: Mapping[str, Tensor], how: str = "whole") -> Tensor:
    """The loss as a training takes it; of a model without a loss, the sum of what it returns."""
    ids, options = batch["input_ids"], transformers.without_cache(model)
    accepted = transformers.accepts(model, "labels")
    if how == "chunked":
        head = transformers.head(model)
        if head is None or not accepted or model.config.is_encoder_decoder:
            raise PlanError(f"The loss of {type(model).__name__} cannot be taken in chunks. Plan the whole loss.")
        return _chunked(model, head, batch, options)
    if not accepted:
        first: Tensor = model(**batch, **options)[0]
        return first.float().sum()
    labels = ids if transformers.head(model) is not None else ids[:, 0].clone()
    if "TokenClassification" in type(model).__name__:
        labels = ids
    loss: Tensor = model(**batch, labels=labels, **options).loss
    return loss


def _chunked(model: Any, head: nn.Module, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    kept: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0])
        return (args[0][..., :0, :],)

    handle = head.register_forward_pre_hook(take)
    try:
        model(**batch, **options)
    finally:
        handle.remove()
    hidden, labels = kept[0].flatten(0, 1), batch["input_ids"].flatten()
    tokens = chunk_length(model.config.get_text_config().vocab_size)
    return summed_cross_entropy(hidden, labels, head, tokens) / labels.numel()


def _forward(name: str, model: Any, setting: Setting) -> Counts:
    """Of one forward of the batch without gradients, each count with `name` in front."""
    key = f"{name} {model.config.to_json_string(use_diff=False)} {setting}"
    if key not in _FORWARDS:
        batch = inputs(model.config, setting)
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = batch["input_ids"]
        with _Counting(setting.kind) as live, torch.no_grad():
            live.hold(held(model))
            before = live.now
            model(**batch, **transformers.without_cache(model))
        counts = {"flops": live.flops, "calls": live.calls, "moved": live.moved, "activations": live.peak - before}
        _FORWARDS[key] = {f"{name} {count}": value for count, value in counts.items()}
    return _FORWARDS[key]


class Saved:
    """What autograd keeps for backward within: bytes of its storages, each once, without those of `held`."""

    def __init__(self, without: list[Tensor]) -> None:
        self.bytes = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in without}
        self._kept: list[Any] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """The hook: counts a tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


def saved_by(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """(what `run` returns, bytes that it has autograd save for backward), with the model's own tensors left out."""
    saved = Saved(held(model))
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        result = run()
    return result, saved.bytes


def _step(model: Any, setting: Setting, trained: list[Tensor]) -> Counts:
    batch = inputs(model.config, setting)
    found: Counts = {}
    with _Counting(setting.kind) as live:
        live.hold(held(model))
        live.hold(batch.values())
        before, already, marks = live.now, len(live.events), [("forward", 0)]
        peaks: list[tuple[str, float, float]] = []

        def gradients() -> int:
            return sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)

        def mark(name: str) -> None:
            """A phase ends, and the next one begins; chunks of a loss are one."""
            if name == "loss" == marks[-1][0]:
                return
            peaks.append((marks[-1][0], live.peak - before, gradients()))
            live.peak = live.now
            marks.append((name, live.now - before))

        handles = _marked(model, mark)
        loss, found["saved"] = saved_by(model, lambda: loss_of(model, batch, setting.loss))
        for handle in handles:
            handle.remove()
        if marks[-1][0] == "forward":
            mark("loss")
        found["kept"] = marks[1][1]
        loss.backward()
        mark("end")
        for parameter in trained:
            parameter.grad = None
    blocks = [one for one in peaks if one[0] == "block"]
    at = {"forward": peaks[0], "loss": peaks[1]}
    at["last block"], at["first block"] = (blocks[0], blocks[-1]) if blocks else (peaks[-1], peaks[-1])
    for name, (_, peak, grads) in at.items():
        found[f"peak {name}"], found[f"gradients {name}"] = peak, grads
    highest = max(peak for _, peak, _ in peaks)
    found[SLACK] = 0.0 if setting.kind == "cpu" else max(0.0, reserved(live.events) - highest - before)
    found["largest transient"] = highest
    found["made"] = sum(size for _, size in live.events[already:] if size < MAPPED)
    return found | {"flops": live.flops, "moved": live.moved, "calls": live.calls}


def _marked(model: Any, mark: Callable[[str], None]) -> list[Any]:
    """Hooks that call `mark` when the head is called, and when a block's backward begins."""
    head = transformers.head(model)
    handles: list[Any] = []
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda module, args: mark("loss"), prepend=True))

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda gradient: mark("block"))

    for path in anatomy.outermost(model):
        handles.append(model.get_submodule(path).register_forward_hook(returned))
    return handles
