"""Training: a recipe from end to end (`veneer.train("recipe.yaml")`), and what its parts are for by themselves.

    result = veneer.train({"model": "my-model", "method": "LoRA", "data": "chats.jsonl", "output": "runs/first"})
    print(result.metrics, result.adapter)

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
    from veneer.train.run import Result

__all__ = [
    "AdapterCallback",
    "Collator",
    "Encoded",
    "Example",
    "History",
    "Recipe",
    "Reference",
    "answer_logits",
    "chrf",
    "encode",
    "encode_prompt",
    "fit",
    "held_out_loss",
    "save_adapters_only",
    "write",
]


class _Callable(ModuleType):
    def __call__(
        self, recipe: Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), **options: Any
    ) -> "Result":
        """Run a recipe; see `veneer.train.run.train`."""
        from veneer.train.run import train

        return train(recipe, overrides, **options)


sys.modules[__name__].__class__ = _Callable
