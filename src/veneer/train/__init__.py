"""Training: a recipe from end to end (`veneer.train("recipe.yaml")`), and what its parts are for by themselves.

    result = veneer.train({"model": "my-model", "method": "LoRA", "data": "chats.jsonl", "output": "runs/first"})
    base, adapted = veneer.train.figures("runs/first/adapter")
    texts = veneer.train.answers("runs/first/adapter", ["What is an adapter?"])

This package is called as a function; it is `veneer.train.run.train`. For a Trainer or a loop of one's own there are
`AdapterCallback`, `save_adapters_only` and `Reference`; the demo's `fit` trains on pairs of prompt and answer.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from veneer.train.accelerating import save_adapters_only
from veneer.train.batch import Collator
from veneer.train.callback import AdapterCallback
from veneer.train.evaluate import answer_logits, chrf, held_out_loss, write
from veneer.train.examples import Example, encode, encode_prompt
from veneer.train.fit import Recipe, fit
from veneer.train.labels import Encoded
from veneer.train.progress import History
from veneer.train.reference import Reference

if TYPE_CHECKING:
    from veneer.train.attempt import Result

__all__ = [
    "AdapterCallback",
    "Collator",
    "Encoded",
    "Example",
    "History",
    "Recipe",
    "Reference",
    "answer_logits",
    "answers",
    "chrf",
    "encode",
    "encode_prompt",
    "figures",
    "fit",
    "held_out_loss",
    "save_adapters_only",
    "write",
]


def figures(adapter: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
    """The held-out figures of the base alone, and with the adapter of a folder that a recipe made.

    `overrides` are texts `key=value` on top of its recipe, as data.held_out=test.jsonl.
    """
    from veneer.train import using

    return using.figures(Path(adapter), overrides)


def answers(
    adapter: str | Path, inputs: Sequence[str], *, max_new_tokens: int = 128, system: str | None = None
) -> list[str]:
    """What a model with the adapter of a folder that a recipe made answers to each input.

    A language model writes the likeliest answer to a prompt, after the system message of its recipe or of `system`.
    Of another task an input is what it was trained on: a text, two with a tab between, or the path of an image or a
    recording; the answer is a text, the name of a class, or a number.
    """
    from veneer.train import using

    return using.answers(Path(adapter), inputs, max_new_tokens, system)


class _Callable(ModuleType):
    def __call__(
        self, recipe: Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), **options: Any
    ) -> "Result":
        """Run a recipe; see `veneer.train.run.train`."""
        from veneer.train.run import train

        return train(recipe, overrides, **options)


sys.modules[__name__].__class__ = _Callable
