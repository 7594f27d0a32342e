"""Everything Veneer raises on purpose.

VeneerError
├── PlaceError             where an adapter should go
│   ├── NoSuchPlace        nothing in the model matches a `where`
│   ├── Overlap            two methods of one adapter claim the same weight
│   └── UnreadableModel    roles cannot be read off this model
├── MethodError            an option of a method is wrong, or does not fit the place
│   └── UnreadableWeight   a weight is packed in a way that cannot be read (NotMergeable, too)
├── AdapterError           names and states of adapters on a model
│   ├── UnknownAdapter     no adapter of that name is attached
│   └── NotMergeable       this adapter cannot be folded into the weights
├── OptimizerError         an optimizer's name, options or state, or the room for it
├── PlanError              what is to be planned has no such model, device or setting
├── LossError              a model's loss cannot be computed in chunks
├── RoutingError           rows of a batch cannot be told apart here
├── FileError              a file cannot be used
│   ├── CorruptFile        truncated, garbled, or not what its name says
│   ├── UnsafeFile         loading it could run code
│   └── WrongModel         the file was made for another model
├── DataError              rows to train on, or what a recipe says about them, cannot be used
├── RecipeError            a recipe says what cannot be, all of it at once
├── RunError               a training cannot go on
│   ├── Diverged           its loss is no number, or grew beyond measure
│   └── Stopped            it was told to stop, and has saved what it needs to go on
├── TemplateError          a chat template shows no boundary between prompt and answer
└── MissingSample          a sample model or data set is not installed

Each message is one sentence or two: what, where (module path or file), what was seen, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """The root: `except veneer.errors.VeneerError` catches all that Veneer raises on purpose."""


class PlaceError(VeneerError, ValueError):
    """An adapter cannot go where it was asked to go."""


class NoSuchPlace(PlaceError):
    """Nothing in the model matches a `where`."""


class Overlap(PlaceError):
    """Two methods of one adapter claim the same weight."""


class UnreadableModel(PlaceError):
    """Roles cannot be read off this model; globs over module paths still work."""


class MethodError(VeneerError, ValueError):
    """An option of a method has a value it cannot have, or does not fit the place it is built for."""


class AdapterError(VeneerError, ValueError):
    """An adapter's name or state does not allow what was asked."""


class UnknownAdapter(AdapterError):
    """No adapter of that name is attached to the model."""


class NotMergeable(AdapterError):
    """The adapter has no form as a plain weight here."""


class OptimizerError(VeneerError, ValueError):
    """An optimizer cannot be had, has no room for its state, or cannot go on from one."""


class PlanError(VeneerError, ValueError):
    """A plan names a model, a device or a setting that there is not, or that cannot be together."""


class UnreadableWeight(MethodError, NotMergeable):
    """A quantized weight is laid out for its kernel alone: no method can look at it, and nothing be merged into it."""


class LossError(VeneerError, ValueError):
    """A model's loss is none that can be computed in chunks of tokens."""


class RoutingError(VeneerError, ValueError):
    """The rows of a batch cannot be given different adapters here."""


class FileError(VeneerError, ValueError):
    """A file or folder cannot be used."""


class CorruptFile(FileError):
    """A file is truncated, garbled, or not what its name says."""


class UnsafeFile(FileError):
    """Reading the file could run code hidden in it."""


class WrongModel(FileError):
    """An adapter's file does not fit the model it is loaded on."""


class DataError(VeneerError, ValueError):
    """Rows to train on, or what a recipe says about them, cannot be used; one line for each mistake."""


class RecipeError(VeneerError, ValueError):
    """A recipe says what cannot be; one line for each mistake, with the file's line and the nearest valid name."""


class RunError(VeneerError, RuntimeError):
    """A training cannot begin or go on: its folder, its memory, or its checkpoints are in the way."""


class Diverged(RunError):
    """The loss of a training is no number, or grew beyond measure."""


class Stopped(RunError):
    """A training was told to stop by a signal; its checkpoint is written, and the message says how to go on."""


class TemplateError(VeneerError, ValueError):
    """A chat template gives no sure boundary between prompt and answer."""


class MissingSample(VeneerError):
    """A sample model or data set that the demo needs is not installed."""


def closest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """` Closest: a, b.` for an error message, or the empty string where nothing is alike.

    A short name is compared with the ends of dotted paths too, so that `q_prj` finds `model.layers.0.self_attn.q_proj`.
    """
    depth = name.count(".") + 1
    tails: dict[str, str] = {}
    for candidate in candidates:
        tails.setdefault(".".join(candidate.split(".")[-depth:]), candidate)
    near = difflib.get_close_matches(name, tails, n=count, cutoff=0.5)
    return f" Closest: {', '.join(tails[tail] for tail in near)}." if near else ""


def listed(names: Iterable[str], most: int = 4) -> str:
    """`a, b, c and 9 more`, so that a message stays one sentence."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
