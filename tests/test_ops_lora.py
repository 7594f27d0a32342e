"""LoRA's own autograd: equal to the plain formula, whatever differentiates it, and nothing kept beside x."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny import perturb
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer.ops import dropout, lora, lora_cpu
from veneer.ops.dropout import NONE, Dropout, draw

TOKENS, IN, OUT, RANK, SCALE = (2, 3), 7, 5, 2, 0.7
built = pytest.mark.skipif(lora_cpu.missing() is not None, reason=f"{lora_cpu.missing()}")


def tensors(dtype=torch.float64, rank=RANK, in_=IN, out=OUT, tokens=TOKENS):
    """x, y, A, B, g, bias, d, b, all of them differentiable."""
    torch.manual_seed(0)
    shapes = [(*tokens, in_), (*tokens, out), (rank, in_), (out, rank), (out,), (out,), (rank,), (out,)]
    found = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    found[4] = (found[4].detach().abs() + 0.5).requires_grad_()
    return found


def seeded(p):
    return Dropout(torch.tensor(123456789123456), round(p * dropout.LANES)) if p else NONE


def mask(drop, x):
    """What x is multiplied by: zeros, and dropout's scale elsewhere."""
    if drop.seed is None:
        return torch.ones_like(x)
    return dropout.kept(drop.seed, drop.threshold, x.numel()).view(x.shape).to(x.dtype) * drop.scale


def case(name, p):
    """(the function of ops/lora.py, the plain formula, how many of `tensors` they take and which)."""
    drop = seeded(p)
    if name == "beside":
        ours = lambda x, y, A, B: lora.beside(x, y, A, B, SCALE, drop)  # noqa: E731
        plain = lambda x, y, A, B: y + SCALE * F.linear(F.linear(x * mask(drop, x), A), B)  # noqa: E731
        return ours, plain, [0, 1, 2, 3]
    if name == "turned":

        def ours(x, y, A, B, g, bias):
            return lora.turned(lora.down(x, A, y.dtype), y, B, g, bias, SCALE)

        return ours, lambda x, y, A, B, g, bias: bias + g * (y - bias + SCALE * x @ A.T @ B.T), [0, 1, 2, 3, 4, 5]

    def ours(x, y, A, B, d, b):
        return lora.scaled(lora.down(x, A, y.dtype, drop), y, d, B, b, SCALE * drop.scale)

    def plain(x, y, A, B, d, b):
        return y + SCALE * b * ((x * mask(drop, x)) @ A.T * d @ B.T)

    return ours, plain, [0, 1, 2, 3, 6, 7]


CASES = [("beside", 0.0), ("beside", 0.4), ("turned", 0.0), ("scaled", 0.0), ("scaled", 0.4)]


@pytest.mark.parametrize(("name", "p"), CASES)
def test_values_and_gradients_are_those_of_the_plain_formula(name, p):
    ours, plain, which = case(name, p)
    inputs = [tensors()[k] for k in which]
    torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-12, atol=1e-12)
    G = torch.randn_like(ours(*inputs))
    found, wanted = (torch.autograd.grad(f(*inputs), inputs, G) for f in (ours, plain))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "p"), CASES)
def test_first_and_second_gradients_are_those_of_the_function(name, p):
    ours, _, which = case(name, p)
    inputs = [tensors()[k] for k in which]
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen):
    inputs = tensors()[:4]
    inputs[frozen].requires_grad_(False)
    wanted = [t for t in inputs if t.requires_grad]
    ours, plain, _ = case("beside", 0.4)
    for a, b in zip(*(torch.autograd.grad(f(*inputs).pow(2).sum(), wanted) for f in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_under_autocast_products_have_its_dtype_and_gradients_the_tensors_own(p):
    x, y, A, B = (t.detach().float().requires_grad_() for t in tensors(in_=64, out=48, rank=8, tokens=(40,))[:4])
    W = torch.randn(48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        answer = lora.beside(x, F.linear(x, W), A, B, SCALE, seeded(p))
        kept = lora.beside(x, y, A, B, SCALE, seeded(p))
    assert answer.dtype == torch.bfloat16
    assert kept.dtype == torch.float32
    found = torch.autograd.grad(answer.float().pow(2).sum(), [x, A, B])
    plain = F.linear(x, W) + SCALE * F.linear(F.linear(x * mask(seeded(p), x), A), B)
    for a, b in zip(found, torch.autograd.grad(plain.pow(2).sum(), [x, A, B]), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize(("name", "p"), CASES)
def test_it_compiles_into_one_graph_with_its_gradients(name, p):
    torch.compiler.reset()
    ours, _, which = case(name, p)
    inputs = [t.detach().float().requires_grad_() for t in (tensors()[k] for k in which)]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(*inputs).pow(2).sum(), inputs) for f in (compiled, ours))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), ours(*inputs))


def test_recomputed_forwards_drop_the_same():
    x, y, A, B = tensors()[:4]
    run = lambda x: lora.beside(x, y, A, B, SCALE, draw(x, 0.4)).pow(2).sum()  # noqa: E731
    torch.manual_seed(3)
    wanted = torch.autograd.grad(run(x), [x, A, B])
    torch.manual_seed(3)
    found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), [x, A, B])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_x_is_kept_as_it_came_and_once(p):
    x = torch.randn(64, IN, dtype=torch.bfloat16, requires_grad=True)
    layers = [[torch.randn(OUT, IN, dtype=torch.bfloat16), *tensors(torch.float32)[2:4]] for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for W, A, B in layers:
            lora.beside(x, F.linear(x, W), A, B, SCALE, seeded(p))
    own = {t.untyped_storage().data_ptr() for layer in layers for t in layer}
    left = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in own}
    assert x.untyped_storage().data_ptr() in left
    assert sum(t.nbytes for t in left.values()) - x.nbytes - (3 * 8 if p else 0) == 3 * 64 * RANK * 2


def test_a_frozen_half_keeps_no_input():
    x, y, A, B = tensors()[:4]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora.beside(x, y, A.detach(), B, SCALE, seeded(0.4))
    assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept)


# ---- the mask ----


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_a_mask_has_its_probability_and_no_pattern(p):
    count = 1 << 20
    masks = [dropout.kept(torch.tensor(seed), round(p * dropout.LANES), count).double() for seed in (1, 2, 1 << 40)]
    bound = 5 * (p * (1 - p) / count) ** 0.5
    for each in masks:
        assert abs(1 - each.mean() - p) < bound + 2**-16
    for a, b in [(masks[0], masks[1]), (masks[0], masks[2]), *((masks[0][k:], masks[0][:-k]) for k in (1, 2, 3, 64))]:
        assert abs(((a - 1 + p) * (b - 1 + p)).mean()) < 5 * p * (1 - p) / count**0.5 + 1e-5


@built
@pytest.mark.parametrize("count", [0, 1, 2, 127, 128, 129, 1000, (1 << 19) + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_c_drops_what_the_reference_drops(dtype, count):
    x = torch.randn(count).to(dtype) + 3
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for seed in (0, 987654321987654321, (1 << 62) - 1):
                seed = torch.tensor(seed)
                for threshold in (1, 3277, 65535):
                    assert torch.equal(lora_cpu.drop(x, seed, threshold), dropout.reference(x, seed, threshold))
    finally:
        torch.set_num_threads(before)


@built
def test_c_is_there_for_every_layout_that_it_drops():
    x = torch.randn(6, 8).T
    seed = torch.tensor(5)
    assert torch.equal(lora_cpu.drop(x, seed, 20000), dropout.reference(x, seed, 20000))


def test_the_c_part_is_there_where_there_is_a_compiler():
    assert lora_cpu.missing() is None or not (shutil.which("cc") or shutil.which("gcc"))


# ---- few tokens ----


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 8, 19, 64])
@pytest.mark.parametrize(("in_", "out"), [(64, 48), (33, 7), (5, 100)])
def test_a_few_tokens_get_the_same_from_c(dtype, rank, in_, out):
    for tokens in [(1, 1), (3,), (2, 4)]:
        x, y, A, B = tensors(torch.float32, rank, in_, out, tokens)[:4]
        A, B = torch.nn.Parameter(A.detach()), torch.nn.Parameter(B.detach())
        x, y = x.detach().to(dtype), y.detach().to(dtype)
        found = lora_cpu.beside(x, y, A, B, SCALE)
        wanted = y.double() + SCALE * x.double() @ A.double().T @ B.double().T
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        torch.nn.init.zeros_(B)
        assert torch.equal(lora_cpu.beside(x, y, A, B, SCALE), y)


def test_what_c_is_not_for_is_left_to_torch():
    x, y, A, B = tensors(torch.float32)[:4]
    x, y, A, B = x.detach(), y.detach(), torch.nn.Parameter(A.detach()), torch.nn.Parameter(B.detach())
    many = torch.randn(lora_cpu.FEW + 1, IN), torch.randn(lora_cpu.FEW + 1, OUT)
    assert lora_cpu.beside(*many, A, B, SCALE) is None
    assert lora_cpu.beside(x.double(), y.double(), A, B, SCALE) is None
    assert lora_cpu.beside(x.transpose(0, 1), y.transpose(0, 1), A, B, SCALE) is None
    assert lora_cpu.beside(x, y, torch.nn.Parameter(A.bfloat16()), B, SCALE) is None


def mixture(dtype, tokens, in_=40, out=33):
    """x and y of seven rows, three pairs of other ranks, and which of them each row gets."""
    torch.manual_seed(0)
    x, y = torch.randn(7, tokens, in_).to(dtype), torch.randn(7, tokens, out).to(dtype)
    pairs = [
        (torch.nn.Parameter(torch.randn(rank, in_)), torch.nn.Parameter(torch.randn(out, rank)), 0.5 * rank)
        for rank in (8, 3, 16)
    ]
    return x, y, pairs, [[0], [1, 2], [], [0], [2], [2, 0, 1], [0]]


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, lora_cpu.FEW])
@torch.no_grad()
def test_rows_under_pairs_of_their_own_get_the_bits_that_they_get_alone(dtype, tokens):
    x, y, pairs, rows = mixture(dtype, tokens)
    found = lora_cpu.Mixed.of(pairs, rows).beside(x, y)
    for row, numbers in enumerate(rows):
        wanted = y[row]
        for A, B, scale in (pairs[number] for number in numbers):
            wanted = lora_cpu.beside(x[row], wanted, A, B, scale)
        assert torch.equal(found[row], wanted), row


@built
@torch.no_grad()
def test_threads_share_rows_and_change_nothing():
    x, y, pairs, rows = mixture(torch.float32, 2500)
    mixed, before = lora_cpu.Mixed.of(pairs, rows), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = mixed.beside(x, y)
        for threads in (2, 3, 40):
            torch.set_num_threads(threads)
            assert torch.equal(mixed.beside(x, y), wanted)
    finally:
        torch.set_num_threads(before)
    alone = y[5] + sum(scale * x[5] @ A.T @ B.T for A, B, scale in (pairs[number] for number in rows[5]))
    torch.testing.assert_close(wanted[5], alone, rtol=1e-4, atol=1e-3)


def test_what_c_is_not_for_in_a_mixture_is_left_to_torch():
    x, y, pairs, rows = mixture(torch.float32, 2)
    ((A, B, scale), *rest) = pairs
    assert lora_cpu.Mixed.of([(torch.nn.Parameter(A.double()), B, scale), *rest], rows) is None
    assert lora_cpu.Mixed.of([(A, torch.nn.Parameter(B.T.contiguous()).T, scale), *rest], rows) is None
    assert lora_cpu.Mixed.of([], [[]]) is None
    if lora_cpu.missing() is None:
        mixed = lora_cpu.Mixed.of(pairs, rows)
        assert mixed.beside(x.double(), y.double()) is None
        assert mixed.beside(x.mT.contiguous().mT, y) is None


@pytest.mark.parametrize("method", [veneer.LoRA(rank=2), veneer.VeRA(rank=4)], ids=lambda method: type(method).__name__)
def test_a_model_may_change_an_answer_in_place(method):
    """As Longformer and its kin do with their queries."""

    class Scaled(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.in_place = nn.Linear(6, 4), in_place

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x)
            if self.in_place:
                y /= 2
                return y
            return y / 2

    gradients = []
    for in_place in (False, True):
        model = Scaled(in_place)
        torch.manual_seed(1)
        adapter = veneer.attach(model, method, where="q")
        perturb(adapter)
        x = torch.ones(2, 3, 6, requires_grad=True)
        model(x).pow(2).sum().backward()
        gradients.append([x.grad, *(p.grad for p in adapter.parameters())])
    for plain, changed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, changed)
