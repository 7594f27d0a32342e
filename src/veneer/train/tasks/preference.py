"""Preferences, by direct preference optimization (DPO): the reference is this model with no adapter active.

    loss = -log sigmoid(β · ((log π(c) - log π₀(c)) - (log π(r) - log π₀(r))))

π(c) and π(r) are the probabilities of the whole chosen and rejected answers after their prompt, by the model as it
trains; π₀ is the base, which is the same weights under `veneer.use(model)`: no copy, and one forward pass more. That is
TRL's `loss_type="sigmoid"`. Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv:2305.18290.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.train import metrics
from veneer.train.evaluate import evaluating
from veneer.train.tasks.task import Scored, Task

BETA = 0.1


def log_probabilities(model: Any, batch: dict[str, Any]) -> Tensor:
    """log π of each answer in a batch (row), summed over its tokens."""
    mask = batch["completion_mask"][:, 1:].bool()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    places = mask.nonzero(as_tuple=True)  # the vocabulary is large, and most places are of prompts
    found = F.log_softmax(logits[:, :-1][places].float(), dim=-1)
    each = found.gather(-1, batch["input_ids"][:, 1:][places].unsqueeze(-1)).squeeze(-1)
    return torch.zeros(len(mask), dtype=each.dtype, device=each.device).index_add(0, places[0], each)


def rewards(model: Any, batch: dict[str, Any], beta: float) -> tuple[Tensor, Tensor]:
    """β · (log π - log π₀) of the chosen and of the rejected answers (pair)."""
    base = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    with evaluating(base), veneer.use(base):
        reference = log_probabilities(base, batch)
    chosen, rejected = (beta * (log_probabilities(model, batch) - reference)).chunk(2)
    return chosen, rejected


def loss(model: Any, batch: dict[str, Any], beta: float = BETA) -> Tensor:
    """The mean loss of a batch of pairs."""
    chosen, rejected = rewards(model, batch, beta)
    return -F.logsigmoid(chosen - rejected).mean()


def _scored(model: Any, batch: dict[str, Any], beta: float = BETA) -> Scored:
    chosen, rejected = rewards(model, batch, beta)
    margins = (chosen - rejected).float().cpu()
    return Scored(float(-F.logsigmoid(margins).mean()), len(margins), (margins,))


def _figures(loss: float, outcomes: tuple[Tensor, ...], names: Sequence[str]) -> dict[str, float]:
    (margins,) = outcomes
    scores = {"reward_accuracy": float((margins > 0).float().mean()), "reward_margin": float(margins.mean())}
    return {name: scores[name] for name in names}


PREFERENCE = Task(
    "preference",
    AutoModelForCausalLM,
    AutoTokenizer,
    metrics=metrics.PAIRS,
    usual=metrics.PAIRS,
    scored=_scored,
    figures=_figures,
    loss=loss,
)


def with_beta(beta: float | None) -> Task:
    """The task with another β, which says how far the model may go from its base: 0.1 where it is None."""
    beta = BETA if beta is None else beta
    return replace(PREFERENCE, scored=partial(_scored, beta=beta), loss=partial(loss, beta=beta))
