"""Activation checkpointing: the same gradients, and nothing is kept or back-propagated below the lowest adapter."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import laws
import pytest
import torch
from laws import FAMILIES, Case
from subjects import SUBJECTS
from tiny import logits
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

import veneer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
PLAIN = {"use_reentrant": False}


def subject(name):
    """The method on a decoder, the first family that it fits."""
    one = SUBJECTS[name]
    family = "llama" if "llama" in one.families else one.families[0]
    return Case(FAMILIES[family], one.method, one.where, one.identity)


def by_transformers(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=PLAIN)


def without_the_hook(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=PLAIN)
    model.disable_input_require_grads()


WAYS = [by_transformers, without_the_hook, veneer.checkpoint_activations]


@contextmanager
def no_input_gradients(monkeypatch):
    """Within, nobody may ask for gradients of the input embeddings."""

    def refuse(self):
        raise AssertionError("enable_input_require_grads was called")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "enable_input_require_grads", refuse)
        yield


@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients_are_the_same(name, monkeypatch):
    case = subject(name)
    with no_input_gradients(monkeypatch):
        adapter = case.attach()
        case.model.train()
        plain = case.gradients(adapter)
    assert any(gradient.abs().sum() > 0 for gradient in plain)
    for way in WAYS:
        way(case.model)
        for one, other in zip(plain, case.gradients(adapter), strict=True):
            laws.same(other, one)
        case.model.activation_checkpointing_disable()
        case.model.disable_input_require_grads()


@dataclass(eq=False)
class Kept:
    """A tensor that something keeps for backward, for as long as it does."""

    tensor: Tensor


class Watched:
    """Two blocks: how often each runs, what the lower keeps for backward, and whether backward goes through it."""

    def __init__(self, model: nn.Module) -> None:
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
        for number, block in enumerate(blocks):
            inner = next(m for name, m in block.named_modules() if "norm" in name or "ln_" in name)
            inner.register_forward_hook(lambda *_, number=number: self.count(number))
        blocks[0].register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        blocks[0].register_forward_hook(self.leave)

    def count(self, number):
        self.runs[number] += 1

    def leave(self, block, inputs, output):
        self.inside = False
        output = output[0] if isinstance(output, tuple) else output
        self.differentiable = output.requires_grad
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(self, "traversed", True))

    def pack(self, tensor):
        kept = Kept(tensor)
        if self.inside:
            self.packed.append(weakref.ref(kept))
        return kept

    def train(self, model, batch):
        self.runs, self.packed, self.inside, self.traversed = [0, 0], [], False, False
        with saved_tensors_hooks(self.pack, lambda kept: kept.tensor):
            answer = logits(model, batch)
        self.kept = sum(kept().tensor.nbytes for kept in self.packed if kept() is not None)
        answer.pow(2).mean().backward()
        return self


def at_the_input(name):
    """Whether the method has something at the embeddings, below which there is nothing."""
    adapter = subject(name).attach()
    return any("embed" in claim.place.path or "wte" in claim.place.path for claim in adapter.claims)


INSIDE = [name for name in SUBJECTS if name != "FullFineTuning" and SUBJECTS[name].families and not at_the_input(name)]


@pytest.mark.parametrize("name", INSIDE)
def test_nothing_is_kept_or_computed_below_the_lowest_adapter(name):
    case = subject(name)
    case.attach()
    veneer.activate(case.model, "default", drop_layers=[0])
    case.model.train()
    watched = Watched(case.model)
    watched.train(case.model, case.batch)
    assert (watched.kept, watched.differentiable, watched.traversed, watched.runs) == (0, False, False, [1, 1])
    veneer.checkpoint_activations(case.model)
    watched.train(case.model, case.batch)
    assert (watched.kept, watched.differentiable, watched.traversed, watched.runs) == (0, False, False, [1, 2])
    by_transformers(case.model)
    watched.train(case.model, case.batch)
    assert (watched.differentiable, watched.traversed, watched.runs) == (True, True, [2, 2]), "what the hook costs"
    assert watched.kept > 0


def test_an_adapter_placed_in_the_top_block_only():
    model = FAMILIES["llama"].model()
    veneer.attach(model, veneer.LoRA(rank=2), where="model.layers.1.*")
    veneer.checkpoint_activations(model.train())
    watched = Watched(model).train(model, FAMILIES["llama"].batch())
    assert (watched.kept, watched.differentiable, watched.traversed, watched.runs) == (0, False, False, [1, 2])


def test_blocks_are_left_out():
    model = FAMILIES["llama"].model()
    veneer.attach(model, veneer.LoRA(rank=2))
    veneer.checkpoint_activations(model.train(), every_n_layers=2)
    assert Watched(model).train(model, FAMILIES["llama"].batch()).runs in ([1, 2], [2, 1])


def test_compiling_gives_one_graph():
    case = Case(FAMILIES["llama"], veneer.LoRA(rank=2))
    adapter = case.attach()
    veneer.checkpoint_activations(case.model.train())
    plain = case.gradients(adapter)
    torch.compiler.reset()
    case.model.zero_grad()
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    compiled(**case.batch, use_cache=False).logits.pow(2).mean().backward()
    for parameter, gradient in zip(adapter.parameters(), plain, strict=True):
        laws.same(parameter.grad, gradient)


def test_a_model_that_cannot():
    with pytest.raises(veneer.errors.PlaceError, match="blocks of a Linear"):
        veneer.checkpoint_activations(nn.Linear(2, 2))
