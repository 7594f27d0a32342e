"""The laws: what every method must keep on every kind of model. Each takes a fresh `Case` and asserts."""

from __future__ import annotations

import copy
import pickle
import tempfile
from dataclasses import dataclass

import torch
from tiny import FAMILIES, Family, logits, perturb
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

import veneer

EXACT = {"rtol": 1e-9, "atol": 1e-9}
"""float64, but for norms that compute in float32 whatever they are given."""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""float32."""


@dataclass
class Case:
    """One method on one family of models."""

    family: Family
    method: veneer.Method
    where: str | None = None
    identity: bool = True

    def __post_init__(self) -> None:
        self.model = self.family.model()
        self.batch = self.family.batch()
        self.base = self.answer()
        self.keys = list(self.model.state_dict())

    def attach(self, name: str = "default", changed: bool = True) -> veneer.Adapter:
        adapter = veneer.attach(self.model, self.method, self.where, name=name)
        if any(claim.delta.waits for claim in adapter.claims):
            veneer.calibrate(self.model, adapter, [self.batch])
        if changed:
            perturb(adapter)
        return adapter

    @torch.no_grad()
    def answer(self) -> Tensor:
        return logits(self.model, self.batch)

    def gradients(self, adapter: veneer.Adapter, whole: bool = False) -> list[Tensor]:
        """The adapter's gradients, with the same dropout each time; `whole` recomputes the whole forward."""
        self.model.zero_grad()
        torch.manual_seed(3)
        run = lambda: logits(self.model, self.batch)  # noqa: E731
        answer = checkpoint(run, use_reentrant=False) if whole else run()
        answer.pow(2).mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapter.parameters()]


def same(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or (EXACT if actual.dtype == torch.float64 else CLOSE)))


def equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; of a quantized tensor all that it is made of."""
    if not is_traceable_wrapper_subclass(one):
        return torch.equal(one, other)
    names, facts = one.__tensor_flatten__()
    theirs, others = other.__tensor_flatten__()
    same = str(facts) == str(others) and names == theirs
    return same and all(equal(getattr(one, name), getattr(other, name)) for name in names)


def differs(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() > 1e-4, "the adapter changes nothing"


def identity_at_initialisation(case: Case) -> None:
    """An untrained adapter changes nothing, bit for bit, where its method says that it starts so."""
    adapter = case.attach(changed=False)
    assert list(adapter.parameters())
    if case.identity:
        assert torch.equal(case.answer(), case.base)


def merged_equals_adapted(case: Case) -> None:
    """A model with the adapter folded into its weights answers as with it attached, and unfolding is bit-exact."""
    adapter = case.attach()
    adapted = case.answer()
    differs(adapted, case.base)
    stored = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
    veneer.merge(case.model, adapter)
    same(case.answer(), adapted, **CLOSE)
    veneer.unmerge(case.model, adapter)
    assert all(equal(tensor, stored[key]) for key, tensor in case.model.state_dict().items())
    veneer.merge(case.model, adapter, permanent=True)
    assert list(case.model.state_dict()) == case.keys
    same(case.answer(), adapted, **CLOSE)


def saving_is_bit_equal(case: Case) -> None:
    """What is saved and loaded on another copy of the base has the same bits and gives the same answer."""
    adapter = case.attach()
    adapted = case.answer()
    with tempfile.TemporaryDirectory() as folder:
        veneer.save(adapter, folder)
        other = case.family.model()
        loaded = veneer.load(other, folder)
    saved = adapter.folded().state_dict()
    assert list(loaded.state_dict()) == list(saved)
    for key, tensor in saved.items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key
        assert tensor.dtype == loaded.state_dict()[key].dtype
    with torch.no_grad():
        assert torch.equal(logits(other, case.batch), adapted)


def detach_restores(case: Case) -> None:
    """Detaching gives back the model that was: weights, keys, hooks and what is trainable."""
    first = next(case.model.parameters())
    first.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in case.model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()]
    veneer.detach(case.model, case.attach())
    assert list(case.model.state_dict()) == list(before)
    assert all(equal(tensor, before[key]) for key, tensor in case.model.state_dict().items())
    assert {name: p.requires_grad for name, p in case.model.named_parameters()} == wanted
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()] == hooks
    assert torch.equal(case.answer(), case.base)


def base_keys_are_kept(case: Case) -> None:
    """With an adapter the base keeps its keys, its class and its modules."""
    kind, identities = type(case.model), {id(m) for m in case.model.modules()}
    case.attach()
    assert [key for key in case.model.state_dict() if key in set(case.keys)] == case.keys
    assert type(case.model) is kind
    assert identities <= {id(m) for m in case.model.modules()}


def mixed_batch_equals_rows_alone(case: Case) -> None:
    """In a batch whose rows have different adapters each row is answered as alone; rows with none as by the base."""
    case.attach("one")
    two = case.attach("two")
    perturb(two)
    with veneer.use(case.model, rows=["one", ("one", "two"), None]):
        mixed = case.answer()
    for row, names in enumerate([("one",), ("one", "two"), ()]):
        with veneer.use(case.model, *names):
            same(mixed[row], case.answer()[row])
    differs(mixed[0], case.base[0])
    differs(mixed[1], case.base[1])
    same(mixed[2], case.base[2])


def only_adapters_get_gradients(case: Case) -> None:
    """Every tensor of the adapter gets a gradient, and nothing of the base does."""
    adapter = case.attach()
    gradients = case.gradients(adapter)
    mine = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in case.model.parameters() if id(p) not in mine)
    for (key, _), gradient in zip(adapter.named_parameters(), gradients, strict=True):
        assert gradient.abs().sum() > 0 or _cannot_get_any(case, key), f"{key} gets no gradient"


def _cannot_get_any(case: Case, key: str) -> bool:
    """What this batch cannot reach: an empty mask token, an unused table, a bias under a softmax."""
    return isinstance(case.method, veneer.FullFineTuning) and any(
        part in key
        for part in ("mask_token", "pooler", "sop_classifier", "key.bias", "k_proj.bias", "seq_relationship")
    )


def checkpointing_gives_the_same_gradients(case: Case) -> None:
    """Recomputing activations, block by block or all at once, gives the same gradients."""
    adapter = case.attach()
    case.model.train()
    plain = case.gradients(adapter)
    recomputations = [case.gradients(adapter, whole=True)]
    if case.model.supports_gradient_checkpointing:
        case.model.activation_checkpointing_enable({"use_reentrant": False})
        recomputations.append(case.gradients(adapter))
    for recomputed in recomputations:
        for a, b in zip(plain, recomputed, strict=True):
            same(a, b)


def copies_and_pickles_work(case: Case) -> None:
    """A deep copy and a pickle answer alike, can be detached, and leave the original as it is."""
    case.attach()
    adapted = case.answer()
    for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        with torch.no_grad():
            assert torch.equal(logits(other, case.batch), adapted)
        with veneer.use(other):
            same(logits(other, case.batch), case.base)
        veneer.detach(other, "default")
        assert list(other.state_dict()) == case.keys
        assert torch.equal(case.answer(), adapted), "changing the copy changed the original"


def generation_with_cache_equals_without(case: Case) -> None:
    """Generated text is the same with the key-value cache and without it."""
    case.attach()
    same_text(case, {"use_cache": True}, {"use_cache": False})


def static_cache_equals_dynamic(case: Case) -> None:
    """Generated text is the same with a static cache and a dynamic one."""
    case.attach()
    same_text(case, {}, {"cache_implementation": "static"})


def same_text(case: Case, one: dict, other: dict) -> None:
    inputs = {key: value for key, value in case.batch.items() if not key.startswith("decoder")}
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(
            case.model.generate(**inputs, **fixed, **one), case.model.generate(**inputs, **fixed, **other)
        )


def padding_changes_nothing(case: Case) -> None:
    """Padding, on the left or on the right, changes no answer at a real token."""
    case.attach()
    inside = case.answer()
    ids, mask = case.batch["input_ids"], case.batch["attention_mask"]
    for side in case.family.pads.split():
        front, back = (2, 0) if side == "left" else (0, 2)
        batch = dict(case.batch)
        batch["input_ids"] = nn.functional.pad(ids, (front, back))
        batch["attention_mask"] = nn.functional.pad(mask, (front, back))
        if "decoder_input_ids" not in batch:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            outer = logits(case.model, batch)
        if "decoder_input_ids" not in batch:
            outer = outer[:, front : front + ids.shape[1]]
        same(outer, inside, **CLOSE)


def compiling_changes_nothing(case: Case, backend: str = "eager") -> None:
    """A compiled model, one graph without a break, answers as the eager one, with the adapter and without it."""
    torch.compiler.reset()  # the backend that runs the graph as it was captured is quick, and inductor has a test
    case.attach()
    compiled = torch.compile(case.model, fullgraph=True, backend=backend)
    run = torch.no_grad()(lambda: compiled(**case.batch).logits)
    same(run(), case.answer(), **CLOSE)
    differs(run(), case.base)
    with veneer.use(case.model):
        same(run(), case.base, **CLOSE)


def meta_counts_the_same(case: Case) -> None:
    """On the meta device an adapter has the parameters, in number and shape, that it has on a real one."""
    real = case.attach()
    ghost = case.family.model().to("meta")
    ghost.tie_weights()
    planned = veneer.attach(ghost, case.method, case.where)
    assert {k: p.shape for k, p in planned.named_parameters()} == {k: p.shape for k, p in real.named_parameters()}
    assert all(p.is_meta for p in planned.parameters())
    assert veneer.count_parameters(ghost) == veneer.count_parameters(case.model)


def composition_is_its_definition(case: Case) -> None:
    """Two adapters of a method act one after the other, in the order of attaching; resting ones do nothing."""
    one = case.attach("one")
    alone = case.answer()
    two = case.attach("two")
    perturb(two)
    veneer.activate(case.model, "two", "one")
    both = case.answer()
    differs(both, alone)
    veneer.activate(case.model, "one")
    assert torch.equal(case.answer(), alone), "a resting adapter changed another's answer"
    veneer.detach(case.model, two)
    assert torch.equal(case.answer(), alone)
    veneer.detach(case.model, one)
    assert torch.equal(case.answer(), case.base)


LAWS = [
    identity_at_initialisation,
    merged_equals_adapted,
    saving_is_bit_equal,
    detach_restores,
    base_keys_are_kept,
    mixed_batch_equals_rows_alone,
    only_adapters_get_gradients,
    checkpointing_gives_the_same_gradients,
    copies_and_pickles_work,
    generation_with_cache_equals_without,
    static_cache_equals_dynamic,
    padding_changes_nothing,
    compiling_changes_nothing,
    meta_counts_the_same,
    composition_is_its_definition,
]
__all__ = ["FAMILIES", "LAWS", "Case"]
