"""Which bytes are alive at each moment of a computation on meta tensors, and what torch's CUDA allocator makes of them.

A training step on the meta device takes no memory and no arithmetic, but it makes and drops the same tensors as the
real one, and autograd keeps the same ones for backward. `Live` records them; `reserved` replays the record through
the rules of torch's caching allocator, whose answer is `max_memory_reserved`. What a kernel takes for itself inside
one operation is not seen.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from veneer.plan.devices import CUDA_ALLOCATOR, Allocator


class Live(TorchDispatchMode):
    """Within, every storage that an operation makes on the meta device is counted until it is dropped.

    now, peak: bytes, each storage rounded as the allocator rounds it. events: (storage, its bytes when it is made, or 0
    when it is dropped), in order. flops: of fused attention, which no single operation shows.
    """

    def __init__(self, allocator: Allocator = CUDA_ALLOCATOR) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocator = allocator
        self.now = self.peak = 0
        self.flops = 0.0
        self.events: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}
        self._known: dict[int, int] = {}
        self._watching = True

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already: weights, buffers, a batch."""
        for tensor in tensors:
            self._see(tensor)

    def take(self, size: int) -> None:
        """Count `size` bytes that no meta tensor stands for, such as a workspace or packed weights."""
        self._make(len(self.events) + (1 << 40), size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # questions such as "is the mask all ones?" have a usual answer, and values are not there
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            narrow = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {}))
            found = torch.empty_like(narrow, dtype=args[0].dtype)  # only meta tensors insist on 16 bits
        else:
            found = _answer(func, args, kwargs or {})
        for leaf in (found,) if isinstance(found, Tensor) else tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._see(leaf)
        return found

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, where)  # type: ignore[no-untyped-call]
        self._watching = False

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        number = len(self.events)
        self._known[address] = number
        self._make(number, storage.nbytes())
        weakref.finalize(storage, self._drop, address)

    def _make(self, number: int, size: int) -> None:
        size = self.allocator.tensor(size) if size else 0
        self._sizes[number] = size
        self.events.append((number, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, address: int) -> None:
        number = self._known.pop(address)
        if self._watching:
            self.now -= self._sizes.pop(number)
            self.events.append((number, 0))


_ANSWERS: dict[Any, tuple[Any, ...] | None] = {}


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns. The shape of an elementwise one is remembered: torch finds it in Python, slowly."""
    if torch.Tag.pointwise not in func.tags or func._schema.is_mutable:
        return func(*args, **kwargs)
    try:
        key = (func, *map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))
        known = _ANSWERS.get(key)
    except TypeError:  # a list among them
        return func(*args, **kwargs)
    if known is not None:
        return torch.empty_strided(known[0], known[1], dtype=known[2], device="meta")
    found = func(*args, **kwargs)
    if isinstance(found, Tensor) and found.is_meta and not any(found is arg for arg in args):
        _ANSWERS[key] = found.shape, found.stride(), found.dtype
    return found


def _kind(value: Any) -> Any:
    """All of an argument that an answer's shape and dtype can depend on."""
    return (
        (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else (type(value), value)
    )


def reserved(events: Iterable[tuple[int, int]], allocator: Allocator = CUDA_ALLOCATOR) -> int:
    """The most that the caching allocator would have taken from the device for these events, in bytes.

    Best fit in a pool of small and one of large blocks, which are split and joined again; no segment is given back.
    """
    pools = {True: _Pool(allocator.block), False: _Pool(allocator.small + 1)}
    where: dict[int, tuple[_Pool, _Block]] = {}
    total = 0
    for number, size in events:
        if size:
            pool = pools[size <= allocator.small]
            block = pool.take(size)
            if block is None:
                segment = allocator.segment(size)
                total += segment
                block = pool.add(segment, size)
            where[number] = pool, block
        elif number in where:
            pool, block = where.pop(number)
            pool.free(block)
    return total


class _Block:
    def __init__(self, size: int) -> None:
        self.size, self.free = size, False
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Pool:
    """Blocks of the segments of one pool; a block is split where at least `least` bytes would be left."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.sizes: list[int] = []
        self.blocks: list[_Block] = []

    def take(self, size: int) -> _Block | None:
        at = bisect.bisect_left(self.sizes, size)
        if at == len(self.sizes):
            return None
        del self.sizes[at]
        return self._cut(self.blocks.pop(at), size)

    def add(self, segment: int, size: int) -> _Block:
        return self._cut(_Block(segment), size)

    def free(self, block: _Block) -> None:
        for near in (block.before, block.after):
            if near is not None and near.free:
                at = bisect.bisect_left(self.sizes, near.size)
                while self.blocks[at] is not near:
                    at += 1
                del self.sizes[at], self.blocks[at]
                first, second = (near, block) if near is block.before else (block, near)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        self._offer(block)

    def _cut(self, block: _Block, size: int) -> _Block:
        block.free = False
        if block.size - size >= self.least:
            rest = _Block(block.size - size)
            block.size, rest.before, rest.after = size, block, block.after
            if rest.after is not None:
                rest.after.before = rest
            block.after = rest
            self._offer(rest)
        return block

    def _offer(self, block: _Block) -> None:
        block.free = True
        at = bisect.bisect_left(self.sizes, block.size)
        self.sizes.insert(at, block.size)
        self.blocks.insert(at, block)


def held(model: nn.Module) -> list[Tensor]:
    """A model's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within, attention in 16 bits keeps what a fused kernel keeps: operands, result and a float32 number a query.

    On the meta device torch would take it apart into products that keep every score. In float32 there is no such kernel
    for grouped heads, and it is left as it is; so is attention in a model's own code.
    """

    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.device.type != "meta" or query.dtype not in (torch.bfloat16, torch.float16):
            return original(query, key, value, *args, **kwargs)
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]

    # A mode would not be there when a checkpointed block is computed again in backward; the innermost name is.
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def cpu_attention() -> Iterator[None]:
    """Within, attention on the meta device keeps what it keeps on a CPU, whose fused kernel takes all dtypes and masks.

    It does not take dropout, nor a mask that learns (T5's positions): then a CPU, too, takes attention apart.
    """

    original = F.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        learned = attn_mask is not None and attn_mask.requires_grad
        same = query.dim() == 4 and query.shape[-1] == value.shape[-1]
        if query.device.type != "meta" or dropout_p or learned or not same:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _tell(4, query, key)
        return run(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=kwargs.get("scale"))[0]

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length = query.shape[:3]
        _tell(4, query, key)
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value = ctx.saved_tensors[:3]  # read once: what a checkpoint computes again is handed out once
        _tell(10, query, key)
        return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def _tell(each: int, query: Tensor, key: Tensor) -> None:
    """Two products forward, five backward, whose operations are a multiple of queries, keys and width."""
    mode = _get_current_dispatch_mode()
    if isinstance(mode, Live):
        mode.flops += each * query.numel() * key.shape[-2]
