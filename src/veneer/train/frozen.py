"""What the blocks below the lowest adapter compute, kept from the first epoch for those that follow.

Nothing below changes while the adapters train, so the hidden states that leave the last frozen block are the same for
an example in every epoch. They lie in one file without a name, in the folder of the run, which goes when the process
does, however that ends: nobody can find half a file, or one of another model.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import RecipeError, RunError
from veneer.seams import transformers

SAY = "training.cache_frozen"


class FrozenBlocks:
    """The blocks below the lowest adapter of a model, and what left them, row by row.

    `collate` makes a batch of rows; `rows` are all there are, padded on the right, and `lengths` their tokens. The file
    is made in `folder`. Raises RecipeError where nothing is frozen, where what leaves the blocks is not the same each
    time, or where it is not all that the upper blocks need; RunError where the disk has no room.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        rows: Any,
        lengths: Sequence[int],
        folder: Path,
    ) -> None:
        self.blocks = _stack(model)
        self.wrap: Callable[[Tensor], Any] = lambda hidden: hidden
        self.last: Tensor | None = None
        samples = [rows[0], rows[min(1, len(rows) - 1)]]
        device = next(model.parameters()).device
        both, one = ({name: value.to(device) if isinstance(value, Tensor) else value
                      for name, value in collate([dict(row) for row in some]).items()}
                     for some in (samples, samples[1:]))  # fmt: skip
        self.count = self._frozen(model, both)
        hidden = self._kept(model, both)
        self.lengths = list(lengths)
        self.dtype, self.width = hidden.dtype, hidden.shape[-1]
        self._try(model, one, hidden[1:, : len(one["input_ids"][0])])
        size = self.width * hidden.element_size()
        self.starts = [0]
        for length in self.lengths:
            self.starts.append(self.starts[-1] + length * size)
        self.there = [False] * len(self.lengths)
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it goes with this object)
            weakref.finalize(self, file.close)
            self.file = file.fileno()
            os.posix_fallocate(self.file, 0, self.bytes)
        except OSError as error:
            raise RunError(
                f"{SAY} needs {self.bytes / 1e6:.0f} MB in {folder}: {error.strerror}. Free them, or leave it out."
            ) from None

    @property
    def bytes(self) -> int:
        """How large the file is."""
        return max(1, self.starts[-1])

    @contextmanager
    def serving(self, numbers: Sequence[int], batch: Mapping[str, Any]) -> Iterator[None]:
        """A forward of these rows: without the frozen blocks where all rows are there; others are kept on the way."""
        ids = batch["input_ids"]
        if all(self.there[number] for number in numbers):
            hidden = torch.zeros(len(numbers), ids.shape[1], self.width, dtype=self.dtype)
            for row, number in enumerate(numbers):
                hidden[row, : self.lengths[number]] = self._read(number)
            with self._skipping(hidden.to(ids.device)):
                yield
            return
        with self._watching():
            yield
        assert self.last is not None
        hidden, self.last = self.last.cpu(), None
        for row, number in enumerate(numbers):
            if not self.there[number]:
                self._write(number, hidden[row, : self.lengths[number]])

    def _read(self, number: int) -> Tensor:
        start, end = self.starts[number : number + 2]
        found = bytearray(os.pread(self.file, end - start, start))
        return torch.frombuffer(found, dtype=self.dtype).view(-1, self.width)

    def _write(self, number: int, hidden: Tensor) -> None:
        found = memoryview(hidden.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        done, start = 0, self.starts[number]
        while done < len(found):
            done += os.pwrite(self.file, found[done:], start + done)
        self.there[number] = True

    @contextmanager
    def _watching(self) -> Iterator[None]:
        def see(block: nn.Module, args: Any, output: Any) -> None:
            self.last = _hidden(output).detach()

        hook = self.blocks[self.count - 1].register_forward_hook(see)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _skipping(self, hidden: Tensor) -> Iterator[None]:
        """For the time of a forward, the frozen blocks hand on `hidden` instead of computing it."""
        frozen = self.blocks[: self.count]
        for block in frozen:
            vars(block)["forward"] = lambda *args, **kwargs: self.wrap(hidden)
        try:
            yield
        finally:
            for block in frozen:
                del vars(block)["forward"]

    def _frozen(self, model: nn.Module, batch: dict[str, Any]) -> int:
        """How many of the lowest blocks no gradient comes to; RecipeError where they leave something to chance."""
        outputs: list[list[Tensor]] = []
        for _ in range(2):
            found: list[Tensor] = []
            hooks = [
                block.register_forward_hook(lambda b, a, o, f=found: f.append(_hidden(o))) for block in self.blocks
            ]
            training = model.training
            try:
                model.train()
                with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(len(outputs))
                    model(**batch)
            finally:
                model.train(training)
                for hook in hooks:
                    hook.remove()
            outputs.append([each.detach() if not each.requires_grad else each for each in found])
        count = next((n for n, each in enumerate(outputs[0]) if each.requires_grad), len(self.blocks))
        if not count:
            raise RecipeError(
                f"{SAY}: no block lies below the lowest that trains. Give the method a `where` in upper blocks, "
                "such as 'model.layers.2?.*', or leave it out."
            )
        if not torch.equal(outputs[0][count - 1], outputs[1][count - 1]):
            raise RecipeError(
                f"{SAY}: the {count} frozen blocks compute something else each time, as dropout does. Set the model's "
                "dropout to 0 in its config, or leave it out."
            )
        return count

    def _kept(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        seen: list[Any] = []
        hook = self.blocks[self.count - 1].register_forward_hook(lambda block, args, output: seen.append(output))
        try:
            with transformers.without_dropout(model), torch.no_grad():
                model(**batch)
        finally:
            hook.remove()
        if isinstance(seen[0], tuple):
            self.wrap = lambda hidden: (hidden, *seen[0][1:])
        return _hidden(seen[0])

    def _try(self, model: nn.Module, batch: dict[str, Any], hidden: Tensor) -> None:
        """RecipeError where what left the frozen blocks in one batch is not all that another one needs."""
        with transformers.without_dropout(model), torch.no_grad():
            plain = float(model(**batch).loss)
            try:
                with self._skipping(hidden):
                    ours = float(model(**batch).loss)
            except (RuntimeError, TypeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise RecipeError(
                    f"{SAY}: {type(model).__name__} needs its lower blocks ({reason}). Leave it out."
                ) from None
        if abs(plain - ours) > (1e-5 if self.dtype == torch.float32 else 2e-2) * abs(plain):
            raise RecipeError(
                f"{SAY}: the loss of {type(model).__name__} is {plain:.6g}, and {ours:.6g} without its frozen blocks: "
                "more than one tensor passes from them to the upper ones. Leave it out."
            )


def _stack(model: Any) -> list[nn.Module]:
    """The model's blocks, in order."""
    paths = transformers.checkpointed(model)
    stacks = {path.rpartition(".")[0] for path in paths}
    if len(stacks) != 1 or model.config.is_encoder_decoder:
        raise RecipeError(f"{SAY}: {type(model).__name__} is not one stack of blocks. Leave it out.")
    return [model.get_submodule(path) for path in paths]


def _hidden(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
