"""Bytes alive on the meta device, and what the allocator makes of them."""

import torch
from torch.nn import functional as F

from veneer.plan.devices import MIB
from veneer.plan.live import Live, fused_attention, reserved


def test_what_is_dropped_is_counted_only_while_it_lives():
    with Live() as live:
        x = torch.empty(1024, device="meta")  # 4 KiB
        live.hold([x])
        for _ in range(3):
            y = x * 2
        assert live.now == 2 * 4096
        assert live.peak == 3 * 4096  # the new y while the old one is still there
        del y
    assert live.now == 4096


def test_a_view_is_no_memory_and_small_things_are_rounded():
    with Live() as live:
        x = torch.empty(10, device="meta")
        assert x.view(2, 5).shape == (2, 5)
    assert live.peak == 512


def test_what_autograd_saves_stays_until_backward():
    with Live() as live:
        w = torch.empty(1024, device="meta", requires_grad=True)
        y = (w.exp() * 1).sum()  # exp keeps its result
        assert live.now == 2 * 4096 + 512
        y.backward()
        del y
    assert live.now == 2 * 4096  # w and its gradient


def test_free_segments_are_used_again_and_joined():
    big = 30 * MIB
    assert reserved([(1, big), (1, 0), (2, 20 * MIB), (3, 10 * MIB)]) == big
    assert reserved([(1, 20 * MIB), (2, 10 * MIB), (1, 0), (2, 0), (3, big)]) == 60 * MIB
    parts = [(0, big), (0, 0), (1, 20 * MIB), (2, 10 * MIB), (2, 0), (1, 0), (3, big)]
    assert reserved(parts) == big


def test_small_tensors_share_a_segment():
    assert reserved([(number, 512) for number in range(100)]) == 2 * MIB


def test_fused_attention_keeps_no_scores():
    q = torch.empty(1, 2, 512, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    scores = 2 * 512 * 512 * 2

    def peak():
        with Live() as live:
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        return live.peak

    assert peak() > scores
    with fused_attention():
        assert peak() < scores / 4
