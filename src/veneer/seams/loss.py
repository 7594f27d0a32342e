"""chunk_loss: the loss of one of transformers' language models without the logits of a whole batch.

Where a forward is given labels, the head is called with no tokens and its hidden states are kept; the model goes on
with logits of no tokens to its `loss_function`, which transformers lets anyone set. Ours sends the hidden states
through head and loss in chunks. What the model does between the two (a soft cap, a scale, a bias) is watched once and
repeated on each chunk. Whether all this is the model's own loss is tried before it is used.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from veneer import site
from veneer.errors import LossError
from veneer.ops.loss import chunk_length, summed_cross_entropy
from veneer.seams import transformers

IGNORED = -100
Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def chunk_loss(model: nn.Module, *, tokens: int | None = None) -> ChunkedLoss:
    """From now on compute the loss of a language model in chunks of `tokens`: less memory, the same numbers.

    It is the model's own loss to 1e-5, with its gradients, for a frozen, quantized, adapted, tied or trained head;
    tokens without a label (-100) cost nothing. It acts in every forward that is given `labels`, in training and in
    evaluation, under any Trainer; such a forward returns logits of no tokens, so metrics that need logits do not go
    with it. Forwards without labels, `generate` among them, are as they were. Undo it by `.remove()`, or use it as
    `with veneer.chunk_loss(model):`.

    `tokens` (default: about 2²⁴ logits, 64 MiB in float32) are what is put through the head at once. Adapters that
    differ by the rows of a batch (`activate(rows=...)`), where they act on the head, get the plain loss.

    Raises LossError where the model is not one of transformers' causal or masked language models, where its forward
    computes the loss itself (T5, BART), or where a trial on a few tokens gives another loss or gradient.
    """
    head = transformers.head(model)
    name = type(model).__name__
    if head is None:
        raise LossError(f"{name} has no head over a vocabulary that can be found. Train it with its own loss.")
    shifts = _shifts(model)
    if isinstance(vars(model).get("_loss_function"), ChunkedLoss):
        raise LossError(
            f"The loss of this {name} is in chunks already. Call remove() on what chunk_loss returned first."
        )
    if shifts is None:
        raise LossError(
            f"{name} has a loss_function of its own kind, which is not the cross-entropy of a causal or masked "
            "language model. Train it with its own loss."
        )
    found = ChunkedLoss(model, head, shifts)
    found._try(tokens)
    return found


class ChunkedLoss:
    """A model's loss in chunks, from `chunk_loss`, until `remove()` or the end of a `with`."""

    def __init__(self, model: nn.Module, head: nn.Module, shifts: bool) -> None:
        self.model, self.head, self.shifts = model, head, shifts
        self.tokens = 64
        self.steps: list[Step] = []
        self.hidden: Tensor | None = None
        self.waiting = False
        self.handles: list[RemovableHandle] = []
        self.position = list(inspect.signature(model.forward).parameters).index("labels")
        self.before = vars(model).get("_loss_function")

    def remove(self) -> None:
        """Give the model its own loss back."""
        for handle in self.handles:
            handle.remove()
        if vars(self.model).get("_loss_function") is self:
            _set_loss(self.model, self.before)
        self.handles = []

    def __enter__(self) -> ChunkedLoss:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss, as the model's forward asks for it: transformers' ForCausalLMLoss or ForMaskedLMLoss."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

            given: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            plain: Any = ForMaskedLMLoss
            if self.shifts:
                plain, given["shift_labels"] = ForCausalLMLoss, shift_labels
            whole: Tensor = plain(logits, labels, vocab_size or logits.shape[-1], **given)
            return whole
        if self.shifts:
            wanted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            labels = wanted if shift_labels is None else shift_labels
        if labels.shape != hidden.shape[:-1]:
            raise LossError(
                f"{type(self.model).__name__} was given labels for {tuple(labels.shape)} tokens, and its head was "
                f"called with {tuple(hidden.shape[:-1])}. Give each token a label, -100 where nothing is learned."
            )
        labels = labels.to(hidden.device)
        found: Tensor = _uncompiled()(self, hidden, labels, labels != ignore_index, num_items_in_batch)
        return found

    def _loss(self, hidden: Tensor, labels: Tensor, asked: Tensor, items: Tensor | int | None) -> Tensor:
        labels = labels[asked]
        total = summed_cross_entropy(hidden[asked], labels, self._logits, self.tokens)
        count = len(labels) if items is None else items
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states through the head, and through what the model does with its logits."""
        logits: Tensor = self.head(hidden)
        for function, args, kwargs in self.steps:
            found = function(*(logits if each is _Logits else each for each in args), **kwargs)
            logits = logits if found is None else found
        return logits

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = args[self.position] if len(args) > self.position else kwargs.get("labels")
        here = site.of(self.head)
        by_row = here is not None and here.routes.rows is not None
        self.waiting = labels is not None and not by_row

    def _take(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.waiting:
            return None
        self.waiting = False
        self.hidden, args, kwargs = _first(args, kwargs, lambda hidden: hidden[..., :0, :])
        return args, kwargs

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.waiting, self.hidden = False, None

    def _use(self) -> None:
        self.handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.head.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        _set_loss(self.model, self)

    def _try(self, tokens: int | None) -> None:
        """Watch one forward, and compare another with the model's own; LossError where they differ."""
        name = type(self.model).__name__
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        numbers = torch.Generator().manual_seed(0)
        ids = torch.randint(table.weight.shape[0], (_rows(self.model), 9), generator=numbers).to(table.weight.device)
        labels = ids.clone()
        labels[0, :4] = labels[-1, 7:] = IGNORED
        try:
            if not transformers.accepts(self.model, "input_ids"):
                raise LossError(f"{name} reads no token ids, on which a loss is tried. Train it with its own loss.")
            with transformers.without_dropout(self.model):
                watch = _Watch(self.head)
                self.steps = watch(self.model, ids[:, :5].contiguous(), labels[:, :5].contiguous())
                plain = _trial(self.model, self.head, ids, labels)
                self.tokens = 5  # so that there are several chunks, the last of them shorter
                self._use()
                ours = _trial(self.model, self.head, ids, labels)
        except LossError:
            self.remove()
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
            self.remove()
            reason = str(error).splitlines()[0][:200].rstrip(".")
            raise LossError(
                f"The loss of {name} cannot be computed in chunks: {reason}. Train it with its own loss."
            ) from error
        exact = plain[1].dtype in (torch.float32, torch.float64)
        for one, other, what in zip(plain, ours, ("loss", *["gradient"] * len(plain)), strict=False):
            if len(plain) != len(ours) or (one - other).norm() > (1e-5 if exact else 2e-2) * one.norm() + 1e-30:
                self.remove()
                raise LossError(
                    f"The loss of {name} in chunks is not its own: the {what} of a trial differs by "
                    f"{float((one - other).norm()):.2g} of {float(one.norm()):.2g}. Train it with its own loss."
                )
        self.tokens = tokens or chunk_length(watch.vocabulary)


@functools.cache
def _uncompiled() -> Callable[..., Tensor]:
    """The loss, which compiled code leaves to eager code; made when wanted, since Dynamo takes a second to import."""
    found: Callable[..., Tensor] = torch.compiler.disable(ChunkedLoss._loss)
    return found


class _Logits:
    """Stands for the logits among the arguments of a step."""


class _Watch(TorchFunctionMode):
    """What a model does with its head's output until it asks for the loss."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.vocabulary = 0
        self.known: list[tuple[Tensor, list[Step]]] = []  # kept, or another tensor could get the same identity
        self.asked: Tensor | None = None

    def __call__(self, model: nn.Module, ids: Tensor, labels: Tensor) -> list[Step]:
        """The steps, in order; LossError where they are not a chain of operations on the logits."""
        before, name = vars(model).get("_loss_function"), type(model).__name__
        hook = self.head.register_forward_hook(self._out)
        _set_loss(model, self._loss)
        try:
            with torch.no_grad(), self:
                model(input_ids=ids, labels=labels, **transformers.without_cache(model))
        finally:
            hook.remove()
            _set_loss(model, before)
        if self.asked is None:
            raise LossError(f"{name} computes its loss in its own forward. Train it with its own loss.")
        steps = self._steps(self.asked)
        if steps is None:
            raise LossError(f"{name} does not make its logits of its head's output alone. Train it with its own loss.")
        return steps

    def _out(self, head: nn.Module, args: Any, output: Tensor) -> None:
        self.known.append((output, []))
        self.vocabulary = output.shape[-1]

    def _loss(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.asked = logits
        return logits.new_zeros(())

    def _steps(self, tensor: Any) -> list[Step] | None:
        return next((steps for known, steps in self.known if known is tensor), None)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self.asked is not None:
            return result
        for each in args:
            steps = self._steps(each)
            if steps is None:
                continue
            step = (function, tuple(_Logits if one is each else one for one in args), kwargs)
            if result is None or result is each:
                steps.append(step)
            elif isinstance(result, Tensor):
                self.known.append((result, [*steps, step]))
            break
        return result


def _trial(model: nn.Module, head: nn.Module, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss, its gradient to the head's input, and those to what learns in the head."""
    found: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if found:
            return None  # a chunk
        _, args, kwargs = _first(args, kwargs, lambda hidden: hidden.detach().requires_grad_())
        found.append(args[0] if args else next(iter(kwargs.values())))
        return args, kwargs

    hook = head.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    try:
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=labels, **transformers.without_cache(model)).loss
            learned = [each for each in head.parameters() if each.requires_grad]
            gradients = torch.autograd.grad(loss, [*found, *learned], materialize_grads=True)
    finally:
        hook.remove()
    return [loss.detach(), *gradients]


def _first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A module's first argument, and its arguments with that one changed."""
    if args:
        return args[0], (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return kwargs[name], args, {**kwargs, name: change(kwargs[name])}


def _rows(model: nn.Module) -> int:
    """How many rows a batch must have: as many as adapters were told of."""
    return next((len(each.routes.rows) for _, each in site.sites(model) if each.routes.rows), 2)


def _set_loss(model: nn.Module, loss: Any) -> None:
    if loss is None:
        vars(model).pop("_loss_function", None)
    else:
        vars(model)["_loss_function"] = loss


def _shifts(model: Any) -> bool | None:
    """Whether the model's loss is of the next token, or of the token itself; None where it is another loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    return {ForCausalLMLoss: True, ForMaskedLMLoss: False}.get(model.loss_function)
