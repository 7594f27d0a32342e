"""The contract: five ports, the places they stand at, and the method that builds what stands there.

A method is one frozen dataclass; for each `Place` it builds a `Delta`, a small module whose forward *is* what happens
at its port. A delta knows nothing of how the base weight is stored, which rows of a batch it serves, or how it is
saved.

| port       | the base computes        | with the delta                 |
|------------|--------------------------|--------------------------------|
| `Before`   | base(x)                  | base(delta(x))                 |
| `After`    | y = base(x)              | delta(x, y)                    |
| `KeyValue` | attention over k, v      | attention over delta(k, v)     |
| `Input`    | embeddings e of ids      | delta(ids, e)                  |
| `Weight`   | a parameter w is read    | delta(w) is read               |

Always call a delta (`delta(x, y)`), never another method on it in a forward pass: offloading tools move its tensors in
`__call__`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from veneer.errors import MethodError, UnreadableModel
from veneer.patterns import matcher

if TYPE_CHECKING:
    from veneer.formats import Format
    from veneer.layers import LinearMap

Unit = Literal["weight", "table", "parameter", "attention", "sublayer", "input"]
Span = tuple[int, int]
T = TypeVar("T")
PASSING = "passing_"
"""How the name of a buffer begins that a training goes on from, and that is no part of the adapter it makes."""


@dataclass(frozen=True)
class Source:
    """Where an activation passes by: argument `key` (a position or a name) of a module's forward."""

    path: str
    module: nn.Module
    key: int | str


@dataclass(frozen=True)
class Place:
    """One spot of a model where a delta can stand.

    `path` names it for people and files. `reader` is the module whose forward uses the thing (hooks go there), `owner`
    the module that holds `parameter`; they differ where code reads a child's weight without calling the child.
    `spans` are the output rows this place means, for one role of a fused projection; None means all of them.
    `tied` are the other places that read the very same parameter and get the very same delta.

    `shape` is the weight's logical shape [out, in, *kernel], of a stack of matrices [experts, out, in]; of an attention
    it is (heads, width of a key, width of a value) of its keys; of a sublayer (its width,). `layer` is the number of
    the block it lies in, -1 outside the blocks.

    A sublayer's output is what the reader returns, or `item` of it; `sources` says where its "input" (behind the norm,
    where there is one) and the "residual" stream pass by; `norm` is what normalises their sum, in a post-norm block.
    `shared` is what `Method.share` made for all its places. `turn` is how an attention moves keys to another position,
    if at all, and `projections` holds the weights that make its keys ("k") and values ("v"), where each is made by one.
    `filled` says that a file's tensors will replace those of the delta, so that a costly start can be left out.
    """

    path: str
    reader_path: str
    reader: nn.Module
    owner_path: str
    owner: nn.Module
    parameter: str
    format: Format
    shape: tuple[int, ...]
    unit: Unit = "weight"
    map: LinearMap | None = None
    functional: bool = False
    spans: tuple[Span, ...] | None = None
    tied: tuple[Place, ...] = ()
    layer: int = -1
    item: int | str | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    norm: nn.Module | None = None
    shared: nn.Module | None = None
    turn: Callable[[Tensor, int], Tensor] | None = None
    filled: bool = False
    projections: Mapping[str, Place] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored, packed where it is quantized."""
        stored = self.format.tensor(self.owner, self.parameter)
        assert stored is not None
        return stored

    @property
    def key(self) -> tuple[int, str]:
        """What two places share when they mean the same thing."""
        if self.unit in ("attention", "sublayer"):
            return id(self.reader), self.unit
        return id(self.owner), self.parameter

    @property
    def new(self) -> dict[str, Any]:
        """`dtype` and `device` for the tensors of a delta here."""
        return {"dtype": compute_dtype(self.weight.dtype), "device": self.weight.device}

    @property
    def bias(self) -> str:
        """Path of the bias beside the weight, or the empty string."""
        name = self.format.bias(self.parameter)
        return f"{self.owner_path}.{name}" if self.owner._parameters.get(name) is not None else ""

    def turned(self, keys: Tensor, by: int) -> Tensor:
        """Keys [kv_heads, length, width] of this attention as they are `by` positions further on.

        Raises UnreadableModel where keys are not rotated by their position.
        """
        if self.turn is None:
            raise UnreadableModel(f"{self.path} has no keys that could be turned.")
        return self.turn(keys, by)

    def matches(self, pattern: str) -> bool:
        """Whether a glob or `re:` regex names this place or the module it lies in."""
        match = matcher(pattern)
        return any(match(path) for path in {self.path, self.owner_path, self.reader_path})

    def choose(self, table: Mapping[str, T], default: T) -> T:
        """The value of the first pattern in `table` that names this place."""
        return next((value for pattern, value in table.items() if self.matches(pattern)), default)

    def restricted(self, spans: tuple[Span, ...], label: str) -> Place:
        """This place, for only these output rows of its weight; `label` tells it from its siblings."""
        rows = sum(stop - start for start, stop in spans)
        dim = self.format.rows
        shape = (*self.shape[:dim], rows, *self.shape[dim + 1 :])
        return dataclasses.replace(self, path=f"{self.path}[{label}]", spans=spans, shape=shape)

    def read(self) -> Tensor:
        """The weight as a dense tensor in its logical shape; only the rows of `spans`."""
        dense = self.format.now(self.owner).read(self.owner, self.parameter)
        if self.spans is None:
            return dense
        return dense.index_select(self.format.rows, row_index(self.spans, dense.device))

    def product(self) -> Product:
        """What multiplies activations by the base weight at every call, however the weight is stored."""
        return Product(self)

    def overlaps(self, other: Place) -> bool:
        """Whether two places share the thing, and rows of it."""
        if self.key != other.key or self.spans is None or other.spans is None:
            return self.key == other.key
        return any(a < d and c < b for a, b in self.spans for c, d in other.spans)

    def write(self, weight: Tensor) -> None:
        """Store `weight` (logical shape, this place's rows) in the base, rounded once to the stored dtype."""
        form = self.format.now(self.owner)
        if self.spans is not None:
            dense = form.read(self.owner, self.parameter).to(weight.dtype)
            weight = dense.index_copy(form.rows, row_index(self.spans, dense.device), weight)
        form.write(self.owner, self.parameter, weight)


class Product:
    """x -> x·Wᵀ with a place's stored weight (its rows), without its bias; holds the base, owns nothing of it."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __call__(self, x: Tensor) -> Tensor:
        form = self.place.format.now(self.place.owner)
        y = form.multiply(self.place.owner, self.place.parameter, x)
        return y if self.place.spans is None else y.index_select(-1, row_index(self.place.spans, y.device))

    def bias(self) -> Tensor | None:
        """The bias beside the weight (its rows) as this forward reads it, or None."""
        owner, name = self.place.owner, self.place.format.bias(self.place.parameter)
        bias = owner.__dict__.get(name, owner._parameters.get(name))
        return bias if bias is None or self.place.spans is None else bias[row_index(self.place.spans, bias.device)]


def row_index(spans: Iterable[Span], device: torch.device) -> Tensor:
    """The row numbers that `spans` mean, in order."""
    return torch.tensor([row for start, stop in spans for row in range(start, stop)], device=device)


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype adapter weights are kept in on a base stored as `stored`: never under float32."""
    whole = stored.is_floating_point and stored.itemsize > 1  # torch promotes no float8
    return torch.promote_types(stored, torch.float32) if whole else torch.float32


class Delta(nn.Module, ABC):
    """What happens at one place. Subclass one of the five ports, not this.

    `mergeable` says that `merge` exists; `additive` that it adds the same whatever other deltas stand there; `linear`
    that its effect is linear in how far its parameters are from their start, which is always the same, so that several
    trained ones add up parameter by parameter; `measures` that the delta looks at the base's weight, which must then
    stay as it is. `fast` names the parameters that LoRA+ trains at a larger rate. `still` names parameters (or the
    modules that hold them) that are saved with the adapter and never trained; persistent buffers are saved too, except
    those that begin with PASSING, which are in checkpoints of the model alone. `reads` names the source of the place
    that `x` is taken from; empty means the module's first argument.

    A delta that `waits` for the "inputs" of its module, or for the dense "weight" that a quantized one was made from,
    is shown them by `veneer.calibrate`, which calls `observe` and then `settle`, which clears it. Until then it cannot
    act or be saved.
    """

    mergeable: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    fast: ClassVar[frozenset[str]] = frozenset()
    still: ClassVar[frozenset[str]] = frozenset()
    reads: str = ""
    waits: Literal["", "inputs", "weight"] = ""

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return not any(name == still or name.startswith(f"{still}.") for still in self.still)

    def borrow(self, **modules: Any) -> None:
        """Keep modules of others as plain attributes, neither registered nor saved here."""
        vars(self).update(modules)

    def regularization(self) -> Tensor | None:
        """A term that training adds to the loss, or None."""
        return None

    def observe(self, x: Tensor) -> None:
        """See what this delta waits for."""

    def settle(self) -> None:
        """Start from what was observed; AdapterError where that is too little."""

    def verify(self) -> None:
        """Raise MethodError where tensors that were read from a file cannot be this delta's, whatever their shapes."""

    def merge(self, weight: Tensor) -> Tensor:
        """The base weight (logical shape) with this delta folded in, computed in the dtype of `weight`."""
        raise MethodError(f"{type(self).__name__} acts on activations; it has no merged weight.")

    def merge_bias(self, bias: Tensor) -> Tensor:
        """The base's bias beside the weight with this delta folded in; most leave it as it is."""
        return bias

    forward: Callable[..., Any]  # each port declares what it is called with


class Before(Delta):
    """base(x) becomes base(delta(x))."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class After(Delta):
    """y = base(x) becomes delta(x, y)."""

    def pair(self) -> tuple[Tensor, Tensor, float] | None:
        """(A [rank, in], B [out, rank], s) where delta(x, y) is now y + s·x·Aᵀ·Bᵀ for every y; None where it is not.

        Rows of a batch under different adapters are then served together, without a call of each delta.
        """
        return None

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor: ...


class KeyValue(Delta):
    """Attention over k, v [batch, kv_heads, length, head_dim] becomes attention over delta(k, v).

    The delta may put `n` positions in front of both; every query of the rows it serves may attend to those. Its own
    tensors are cast to the dtype and device of k and v.

    Where `apart` is set, delta(k, v) is its own positions alone: every query attends to them apart from the layer's own
    (a second softmax), and what comes out is added.

    `position_offset` lets the base's tokens start so many positions further on, where positions are learned and the
    place has the source "positions".
    """

    apart: ClassVar[bool] = False
    position_offset: int = 0

    @abstractmethod
    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class Input(Delta):
    """The input embeddings e [batch, length, width] of ids become delta(ids, e).

    With `slots` of 0 that has the same shape. Otherwise it has `slots` positions in front of e, which stays as it is;
    every token may attend to those, and ids is None where the model was given embeddings. The place then has the
    source "stack".
    """

    slots: int = 0

    @abstractmethod
    def forward(self, ids: Tensor | None, embeddings: Tensor) -> Tensor: ...


class Weight(Delta):
    """Where a parameter w (in its logical shape) is read, delta(w) is read instead; the stored w stays as it is."""

    @abstractmethod
    def forward(self, w: Tensor) -> Tensor: ...


@cache
def _checkers(method: type) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(method, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(method)}


@dataclass(frozen=True)
class Method(ABC):
    """One PEFT method: its options, its checks, and the delta it builds. Subclasses are frozen dataclasses.

    `unit` is what it acts on: "weight" (linear maps: Linear, Conv1D, Embedding, Conv, attention projections), "table"
    (an embedding, with all that is tied to it), "parameter" (any parameter), "attention" (keys and values), "sublayer"
    (a branch beside the residual stream) or "input" (input embeddings). `default_where` is where it goes when the user
    names nothing, `learning_rate` what a recipe trains it with (AdamW) when it names none.
    """

    unit: ClassVar[Unit] = "weight"
    default_where: ClassVar[str] = "linear"
    learning_rate: ClassVar[float] = 5e-4

    def __post_init__(self) -> None:
        """Check every option against its annotation, so that a wrong value is named before it does harm."""
        for name, checker in _checkers(type(self)).items():
            value = vars(self)[name]
            try:
                object.__setattr__(self, name, checker.validate_python(value, strict=True))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Input ")
                raise MethodError(f"{type(self).__name__}({name}={value!r}): {name} {reason}.") from None

    @abstractmethod
    def build(self, place: Place) -> Delta:
        """The delta for one place, on the place's device and in `compute_dtype` of its weight."""

    def select(self, places: Sequence[Place]) -> Sequence[Place]:
        """Those of the places a `where` names that this method acts on; MethodError where none is left."""
        return places

    def share(self, places: Sequence[Place]) -> nn.Module | None:
        """One module for all the places together, registered, counted and saved once; `place.shared` at build."""
        return None

    def penalty(self, deltas: Sequence[Delta]) -> Tensor | None:
        """What training adds to the loss for this method's deltas: the sum of their own terms, unless it says else."""
        terms = [term for delta in deltas if (term := delta.regularization()) is not None]
        return torch.stack(terms).sum() if terms else None

    def after_step(self, deltas: Sequence[Delta], step: int) -> None:
        """Called by training after optimizer step number `step`, from 1, with this method's deltas."""

    def check(self, places: Sequence[Place]) -> None:
        """Raise MethodError where an option does not fit, or would change nothing at, all the places together."""

    def folded(self, delta: Delta) -> tuple[Method, Delta]:
        """What is saved in place of this method and its delta, and computes the same, without what only trains it."""
        return self, delta

    def companions(self, places: Sequence[Place]) -> Iterable[tuple[str, Method]]:
        """Further (where, method) pairs that belong to this one, such as biases trained beside LoRA."""
        return ()
