"""The guide's code, section by section, and every combination as one adapter on disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, logits, perturb

import veneer

GUIDE = (Path(__file__).parents[1] / "docs" / "combining.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```", body, flags=re.DOTALL | re.MULTILINE)
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", GUIDE, flags=re.DOTALL | re.MULTILINE)
}


def test_every_section_of_the_guide_has_code():
    assert len(SECTIONS) == 7
    assert all(SECTIONS.values())
    assert sum(map(len, SECTIONS.values())) == GUIDE.count("```python")


@pytest.mark.parametrize("title", SECTIONS)
def test_the_guide_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = FAMILIES["llama"].model()
    batch = FAMILIES["llama"].batch()
    names = {"veneer": veneer, "model": model, "batch": {**batch, "labels": batch["input_ids"]}}
    base = logits(model, batch)
    for block in SECTIONS[title]:
        exec(compile(block, f"docs/combining.md, {title}", "exec"), names)
    assert veneer.adapters(model)
    for adapter in veneer.adapters(model).values():
        perturb(adapter, 0.05)
    assert (logits(model, batch) - base).abs().max() > 1e-4
    for folder in tmp_path.iterdir():
        saved = veneer.load(FAMILIES["llama"].model(), folder)
        assert sum(p.numel() for p in saved.parameters())


COMBINATIONS = {
    "two LoRAs stacked": lambda: (veneer.LoRA(rank=2), veneer.LoRA(rank=3, alpha=5.0)),
    "two LoRAs at places that meet": lambda: {
        "attention.q": (veneer.LoRA(rank=2), veneer.LoRA(rank=3, use_rslora=True)),
        "mlp": veneer.LoRA(rank=1),
    },
    "LoRA and whole weights": lambda: {"attention.q | attention.v": veneer.LoRA(), "mlp.up": veneer.FullFineTuning()},
    "LoRA and adapters": lambda: {"attention": veneer.LoRA(), "mlp": veneer.BottleneckAdapter(width=4)},
    "LoRA on the layers of an adapter": lambda: {
        "mlp.up | mlp.down": veneer.LoRA(),
        "mlp": veneer.BottleneckAdapter(width=4, placement="parallel"),
    },
    "adapters stacked": lambda: {
        "mlp": (veneer.BottleneckAdapter(width=4), veneer.BottleneckAdapter(width=3, placement="parallel"))
    },
    "gated and not": lambda: {
        "attention.q": (veneer.Gated(veneer.LoRA()), veneer.LoRA()),
        "mlp": veneer.Gated(veneer.BottleneckAdapter(width=4)),
    },
    "prefix and LoRA": lambda: {
        "attention": veneer.PrefixTuning(length=4),
        "attention.q | attention.v": veneer.LoRA(),
    },
    "MAM": lambda: {
        "attention": veneer.PrefixTuning(length=30),
        "mlp": veneer.BottleneckAdapter(width=8, placement="parallel", scaling=4.0),
    },
    "UniPELT": lambda: {
        "attention": veneer.Gated(veneer.PrefixTuning(length=10)),
        "attention.q | attention.v": veneer.Gated(veneer.LoRA(rank=8)),
        "mlp": veneer.Gated(veneer.BottleneckAdapter(width=4, placement="after_residual", activation="silu")),
    },
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_combination_is_one_adapter(combination, family, tmp_path):
    model = FAMILIES[family].model()
    batch = FAMILIES[family].batch()
    base, keys = logits(model, batch), list(model.state_dict())
    adapter = veneer.attach(model, COMBINATIONS[combination](), name="one")
    perturb(adapter)
    adapted = logits(model, batch)
    assert (adapted - base).abs().max() > 1e-4
    adapted.pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    veneer.save(adapter, tmp_path)
    other = FAMILIES[family].model()
    loaded = veneer.load(other, tmp_path, name="again")
    assert [claim.method for claim in loaded.claims] == [claim.method for claim in adapter.claims]
    assert torch.equal(logits(other, batch), adapted)
    veneer.detach(model, adapter)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, batch), base)
