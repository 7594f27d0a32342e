"""training.compile: the blocks of a model compiled where they stand, for the time of each training step.

Every block has the same code, so a few graphs serve them all: one for each kind of block, of mask, and of input that
asks for a gradient or does not. Compiled code does not watch hooks, by which adapters act, so blocks whose hooks differ
are told apart by a text that it does watch. Lengths and batch sizes are variables of a graph, but for batches of one
row, of which torch makes graphs of their own. Evaluation, generation and whoever gets the model afterwards run it as it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from veneer.errors import RecipeError
from veneer.seams import transformers
from veneer.train.machine import device

SAY = "training.compile"
LIMIT = 64
"""Graphs that one piece of code may have. torch's own limit is 8, which models of several kinds of blocks exceed."""


def refuse_without_compiler() -> None:
    """RecipeError where torch.compile has nothing to make machine code with."""
    if device().type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise RecipeError(
                f"{SAY} needs a C++ compiler, and neither $CXX nor g++ runs here. Install one, or leave it out."
            ) from None
    elif not torch.utils._triton.has_triton():
        raise RecipeError(f"{SAY} needs Triton on this device. Run: pip install triton, or leave it out.")


class CompiledBlocks:
    """A model's blocks from the one numbered `first` on, compiled within `step`, each graph when it is first needed.

    `graphs` are those made so far, `steps` the training steps that made some. Raises RecipeError for a model without
    blocks, and in `step` for blocks that are no single graph.
    """

    def __init__(self, model: nn.Module, first: int = 0) -> None:
        paths = transformers.checkpointed(model)[first:]
        if not paths:
            raise RecipeError(f"{SAY}: {type(model).__name__} has no blocks of transformers'. Leave it out.")
        self.name = type(model).__name__
        self.blocks: list[nn.Module] = [model.get_submodule(path) for path in paths]
        compiled = torch.compile(_call, fullgraph=True, dynamic=True)
        kinds = [_hooks(block) for block in self.blocks]
        self.calls: list[Callable[..., Any]] = [
            partial(compiled, f"kind {kinds.index(kind)}", block)
            for block, kind in zip(self.blocks, kinds, strict=True)
        ]
        self.graphs = 0
        self.steps: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Within, forwards and backwards of the blocks are compiled."""
        from torch._dynamo.exc import TorchDynamoException
        from torch._dynamo.utils import counters

        before = counters["stats"]["unique_graphs"]
        try:
            self._set(self.calls)
            with torch.compiler.config.patch(recompile_limit=LIMIT):  # type: ignore[attr-defined]  # made at import
                yield
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise RecipeError(
                f"{SAY}: the blocks of this {self.name} with what is attached to them are not one graph ({reason}). "
                "Leave it out."
            ) from error
        finally:
            self._set([None] * len(self.blocks))
            made = counters["stats"]["unique_graphs"] - before
            if made:
                self.graphs += made
                self.steps.append(number)

    def _set(self, calls: list[Any]) -> None:
        for block, call in zip(self.blocks, calls, strict=True):
            block._compiled_call_impl = call  # what nn.Module.compile sets; torch has no word for taking it back

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {"graphs": self.graphs, "at_steps": self.steps}


def _call(kind: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    assert kind.startswith("kind")  # a text that is looked at makes a graph of its own for each value
    return block._call_impl(*args, **kwargs)


def _hooks(block: nn.Module) -> list[Any]:
    """What hangs on each module of a block, in order."""
    return [
        (
            path,
            [
                hook.func if isinstance(hook, partial) else hook
                for hook in (*each._forward_pre_hooks.values(), *each._forward_hooks.values())
            ],
        )
        for path, each in block.named_modules()
    ]
