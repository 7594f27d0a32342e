"""Sums, TIES and DARE beside PEFT's, and adapters brought to LoRA as PEFT opens them."""

from __future__ import annotations

import warnings

import pytest
import torch
from laws import same
from tiny import FAMILIES, logits, perturb

import veneer
from veneer import changes

with warnings.catch_warnings():
    # peft imports every quantizer it finds, and some of those warn at import that they lack a kernel or a compiler
    warnings.simplefilter("ignore")
    import peft
    from peft.utils import merge_utils

# peft asks transformers' models for a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WHERE = "attention.q | attention.v"


def with_two(folder):
    """A model with adapters 'a' and 'b', and the same in PEFT."""
    model = FAMILIES["llama"].model()
    for name, rank, scale in (("a", 3, 0.2), ("b", 3, 0.3)):
        adapter = veneer.attach(model, veneer.LoRA(rank=rank, alpha=4.0), WHERE, name=name)
        perturb(adapter, scale)
        veneer.save(adapter, folder / name)
    theirs = peft.PeftModel.from_pretrained(
        FAMILIES["llama"].model(), folder / "a", adapter_name="a", autocast_adapter_dtype=False
    )
    theirs.load_adapter(folder / "b", adapter_name="b", autocast_adapter_dtype=False)
    return model, theirs.eval()


@torch.no_grad()
def answers(model, theirs, how, kind, **options):
    rank = {"svd_rank": options["rank"]} if "rank" in options else {}
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type=kind, **rank)
    theirs.set_adapter("c")
    veneer.combine(model, {"a": 0.7, "b": 0.3}, how=how, name="c", **options)
    batch = FAMILIES["llama"].batch()
    with veneer.use(model, "c"):
        return logits(model, batch), logits(theirs, batch)


def test_a_sum_is_pefts_cat(tmp_path):
    same(*answers(*with_two(tmp_path), "sum", "cat"))


def test_a_low_rank_of_the_sum_is_pefts_svd(tmp_path):
    same(*answers(*with_two(tmp_path), "svd", "svd", rank=2), rtol=1e-5, atol=1e-5)


def test_pefts_linear_is_another_adapter(tmp_path):
    ours, theirs = answers(*with_two(tmp_path), "sum", "linear")
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.7)])
def test_ties_of_changes_is_pefts_function(weights):
    """With one λ, as in the paper. Where weights differ, PEFT elects signs without them, and Veneer with them."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(8, 10, generator=generator, dtype=torch.float64) for _ in weights]
    theirs = merge_utils.ties(tensors, torch.tensor(weights, dtype=torch.float64), density=0.25)
    same(changes.ties(list(zip(weights, tensors, strict=True)), 0.25), theirs)


METHODS = {
    "DoRA": (veneer.DoRA(rank=2),),
    "VeRA": (veneer.VeRA(rank=8),),
    "OFT": (veneer.OFT(block_size=8),),
    "IA3": (veneer.IA3(),),
    "whole": (veneer.FullFineTuning(), "block"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", METHODS)
def test_peft_opens_what_was_brought_to_lora(kind, family, tmp_path):
    model, batch = FAMILIES[family].model(), FAMILIES[family].batch()
    perturb(veneer.attach(model, *METHODS[kind], name="a"), 0.05)
    adapted = logits(model, batch)
    done = veneer.to_lora(model, "a", 64, name="lora")
    same(logits_of(model, "lora", batch), adapted, rtol=1e-6, atol=1e-6)
    veneer.save(done.adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(FAMILIES[family].model(), tmp_path, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        same(logits(theirs, batch), adapted, rtol=1e-6, atol=1e-6)


def logits_of(model, name, batch):
    with veneer.use(model, name):
        return logits(model, batch)
