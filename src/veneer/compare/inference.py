"""What an adapter costs at inference, attached and merged, against the base in the same process, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import veneer
from veneer.compare.scoring import fitting
from veneer.errors import VeneerError
from veneer.seams.quiet import quiet
from veneer.train import models
from veneer.train.attempt import Result
from veneer.train.data import Prepared
from veneer.train.evaluate import evaluating

BATCHES = (1, 16)
ROUNDS, PROMPT, NEW = 3, 32, 8


def measure(result: Result, prepared: Prepared) -> dict[str, Any]:
    """`unmerged` and `merged`, each by batch size: seconds of the base and of the adapted model, and their ratio.

    prefill: one forward over PROMPT tokens a row; of a model that writes, `generate` of one token. decode: each token
    after it, from `generate` of NEW more. Base and adapted model take turns ROUNDS times, after one turn that does not
    count; seconds are medians, a ratio is the median of the ratios of the turns. tokens a second: rows over the seconds
    of a decoded token, or PROMPT · rows over those of a prefill where nothing is decoded. Without a merged form, why.
    The merged model replaces the adapted one in `result`.
    """
    assert result.recipe.record is not None
    base, _ = models.base(result.recipe.model, prepared.task, prepared.labels)
    base.eval()
    writes = prepared.task in ("causal", "seq2seq")
    found: dict[str, Any] = {"unmerged": _against(base, result.model, writes)}
    try:
        veneer.merge(result.model, result.adapter, permanent=True)
    except VeneerError as error:
        return found | {"not_merged": str(error)}
    return found | {"merged": _against(base, result.model, writes)}


def _against(base: Any, adapted: Any, writes: bool) -> dict[str, Any]:
    return {str(rows): _of_batch(base, adapted, rows, writes) for rows in BATCHES}


def _of_batch(base: Any, adapted: Any, rows: int, writes: bool) -> dict[str, Any]:
    vocabulary = base.get_input_embeddings().num_embeddings
    length = fitting(base, PROMPT)
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    turns: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    for _ in range(ROUNDS + 1):
        first = [_timed(model, ids, 1 if writes else 0) for model in (base, adapted)]
        turns["prefill"].append((first[0], first[1]))
        if writes:
            whole = [_timed(model, ids, 1 + NEW) for model in (base, adapted)]
            each = [max(long - short, 1e-9) / NEW for long, short in zip(whole, first, strict=True)]
            turns["decode"].append((each[0], each[1]))
    found: dict[str, Any] = {}
    for name, pairs in turns.items():
        if counted := pairs[1:]:
            was, now = median(one for one, _ in counted), median(other for _, other in counted)
            tokens = rows if name == "decode" else rows * length
            found[name] = {
                "base": was,
                "adapted": now,
                "ratio": median(other / one for one, other in counted),
                "tokens_per_second": tokens / now,
            }
    return found


def _timed(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds of one forward, or of writing so many tokens."""
    batch = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}

    def work() -> None:
        if new:
            model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        else:
            model(**batch)

    with evaluating(model), quiet():
        return _seconds(work, model.device)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _settle(device)
    start = time.perf_counter()
    work()
    _settle(device)
    return time.perf_counter() - start


def _settle(device: torch.device) -> None:
    """Wait for what an accelerator has been given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
