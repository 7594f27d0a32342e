"""What a plan for a CPU says of glibc's malloc, which keeps a share of what a step makes."""

import platform

import pytest
from transformers import LlamaConfig

import veneer
from veneer.plan import host
from veneer.plan.devices import MIB, Device

CPU = Device("cpu", MIB, None, {}, "cpu", "")
SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
CONFIG, DEEP = (
    LlamaConfig(**SIZES, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]) for layers in (8, 64)
)


def overhead(**options):
    return veneer.plan(CONFIG, veneer.LoRA(rank=2), device=CPU, dtype="float32", **options).memory["overhead"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_a_plan_expects_what_glibc_keeps_and_more_of_a_longer_step(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    one, four = overhead(sequence_length=16), overhead(sequence_length=64)
    assert 0 < one.expected - one.low < one.high - one.low
    assert four.expected - four.low > 2 * (one.expected - one.low)
    deep = veneer.plan(DEEP, veneer.LoRA(rank=2), device=CPU, dtype="float32", sequence_length=16).memory["overhead"]
    assert deep.expected - deep.low == pytest.approx(one.expected - one.low, rel=0.5)


def test_nothing_is_kept_where_malloc_gives_back_or_is_not_glibcs(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert host.kept(1000.0) == (0.0, 0.0)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert host.kept(1000.0) == (0.0, 0.0)
