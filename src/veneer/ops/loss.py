"""Cross-entropy of a language model's head in chunks of tokens, so that the logits of a batch are never there at once.

    loss = Σ_t logsumexp(z_t) − z_t[label_t],   z = head(hidden),   ∂loss/∂z = softmax(z) − onehot(label)

A chunk's logits are made, and their gradient is sent through the head at once: to the hidden states, and to whatever of
the head learns. Backward only scales what is there. So the head is multiplied as often as in the plain loss, and the
memory is that of one chunk and of the hidden states' gradient.

The idea is that of Liger's fused linear cross-entropy (Hsu et al., 2024, arXiv:2410.10989); here the head is any
callable, so it may be quantized, adapted, tied or trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**24
"""How many logits there are at once: 64 MiB in float32."""


def chunk_length(vocabulary: int) -> int:
    """Tokens of a chunk, about LOGITS logits; at least 64, so that reading the head is not what takes the time."""
    return max(64, LOGITS // vocabulary)


def summed_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], tokens: int) -> Tensor:
    """The sum of the cross-entropies, a float32 scalar, of `hidden` [n, width] with `labels` [n], int64, none ignored.

    `head` takes [1, k, width] to logits [1, k, vocabulary], each token for itself; k is at most `tokens`. The result
    has a gradient to `hidden` and to the parameters that `head` uses, which can be taken once.
    """
    inner, total = hidden.detach(), torch.zeros((), dtype=torch.float32, device=hidden.device)
    differentiable, to_hidden = torch.is_grad_enabled(), torch.empty(0)
    learned: list[Tensor] = []
    to_learned: list[Tensor] = []
    for start in range(0, len(labels), tokens):
        some = slice(start, start + tokens)
        with torch.set_grad_enabled(differentiable):
            x = inner[some].requires_grad_(differentiable)
            logits = head(x[None]).squeeze(0)  # [0] would have a gradient as large as the logits
        if differentiable and not start:
            learned = [each for each in _leaves(logits) if each is not x]
            # sums of bfloat16 gradients would lose what they are summed from
            to_learned = [torch.zeros_like(each, dtype=torch.float32) for each in learned]
            differentiable = bool(learned) or hidden.requires_grad
            to_hidden = torch.empty_like(inner) if differentiable else to_hidden
        logp = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
        asked = labels[some, None]
        total -= logp.gather(1, asked).sum()
        if not differentiable:
            continue
        to_logits = logp.exp_().scatter_add_(1, asked, torch.full_like(asked, -1, dtype=torch.float32))
        to_x, *more = torch.autograd.grad(logits, [x, *learned], to_logits.to(logits.dtype))
        to_hidden[some] = to_x
        for one, piece in zip(to_learned, more, strict=True):
            one += piece
        del logits, logp, to_logits
    if not len(labels):
        return total + 0 * hidden.sum()
    if not differentiable:
        return total
    inputs, gradients = [hidden, *learned], [to_hidden, *to_learned]
    found: Tensor = _Known.apply(total, len(inputs), *inputs, *gradients)  # type: ignore[no-untyped-call]
    return found


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors that a result's gradient ends in."""
    found: dict[int, Tensor] = {}
    seen, ahead = set(), [tensor.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "AccumulateGrad" in node.name():
            found[id(node.variable)] = node.variable
        ahead += [before for before, _ in node.next_functions]
    return list(found.values())


class _Known(torch.autograd.Function):
    """A value whose gradients to some inputs are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.dtypes = [each.dtype for each in tensors[:count]]
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        known = [(each * scale).to(dtype) for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, *known, *([None] * len(known))
