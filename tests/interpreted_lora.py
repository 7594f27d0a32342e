"""What `test_lora_triton.py` runs in Triton's interpreter, in a process of its own: there the kernels run on a CPU."""

from __future__ import annotations

import pytest
import torch
import triton
from tiny import perturb
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer.ops import dropout, grouped_triton, kernels, lora, lora_cpu, lora_triton
from veneer.ops.dropout import NONE, Dropout

assert triton.knobs.runtime.interpret, "run by tests/test_lora_triton.py"

NEAR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 4 * 2**-7}
"""Where a GPU rounds to bfloat16 the interpreter cuts bits off A, B, the product with A and the sum: 2^-7 of each."""
SEED = torch.tensor(123456789123456789)
DROPS = [NONE, Dropout(SEED, 20000)]
SIZES = [((2, 9), 70, 37, 3), ((1,), 33, 130, 1), ((130,), 40, 34, 8), ((0,), 16, 16, 2), ((3, 2), 20, 24, 64)]
"""Tokens, in, out and rank: odd ones, one of each, some that no tile divides, none, and a rank of several tiles."""


def near(found, wanted):
    assert found.shape == wanted.shape
    size, distance = wanted.double().norm(), (found.double() - wanted.double()).norm()
    assert distance <= NEAR[found.dtype] * size, float(distance / size)


def scattered(*shape):
    """Random numbers that are not contiguous."""
    return torch.randn(*shape).mT.contiguous().mT if len(shape) > 1 else torch.randn(shape)


# the kernels


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize(("tokens", "width", "out", "rank"), SIZES)
@pytest.mark.parametrize("dtype", NEAR)
def test_products(dtype, tokens, width, out, rank, drop):
    torch.manual_seed(0)
    x, y, dh = (scattered(*tokens, size).to(dtype) for size in (width, out, rank))
    A, B = torch.randn(rank, width), torch.randn(out, rank)
    draw, dropped = (drop.seed, drop.threshold), drop(x)
    near(lora_triton.down(x, A, dtype, *draw), (dropped.double() @ A.double().T).to(dtype))
    dx = lora_triton.into(dh, A, dtype, *draw)
    near(dx, drop(dh.double() @ A.double()).to(dtype))
    assert torch.equal(dx == 0, dropped == 0)
    flat = (each.double().flatten(0, -2) for each in (dh, dropped))
    near(lora_triton.across(dh, x, torch.float32, *draw), torch.mm(next(flat).T, next(flat)).float())
    near(lora_triton.up(dh, y, B, 0.7), (y.double() + 0.7 * dh.double() @ B.double().T).to(dtype))
    assert torch.equal(lora_triton.up(dh, y, torch.zeros_like(B), 0.7), y)
    x, y = x[..., :5, :], y[..., :5, :]
    near(lora_triton.few(x, y, A, B, 0.7), (y.double() + 0.7 * x.double() @ A.double().T @ B.double().T).to(dtype))


@pytest.mark.parametrize("seed", [0, 987654321987654321, (1 << 62) - 1])
@pytest.mark.parametrize("dtype", NEAR)
def test_masks(dtype, seed):
    seed = torch.tensor(seed)
    edge = int(dropout.words(seed, 5)[4] & 0xFFFF)  # the one that is not below its own number
    for shape, threshold in [((8195,), 1), ((6, 70), 3277), ((70, 3), 65535), ((0, 4), 9), ((4, 5), edge)]:
        x = scattered(*shape).to(dtype)
        assert torch.equal(lora_triton.drop(x, seed, threshold), dropout.reference(x, seed, threshold))


@pytest.mark.parametrize("tokens", [1, 20, 0])
@pytest.mark.parametrize("dtype", NEAR)
def test_rows_under_pairs_of_their_own(dtype, tokens):
    torch.manual_seed(0)
    x, y = scattered(7, tokens, 40).to(dtype), torch.randn(7, tokens, 33).to(dtype)
    pairs = [(torch.randn(rank, 40), torch.randn(33, rank), 0.5 * rank) for rank in (8, 3, 1, 64)]
    rows = [[0], [1, 2], [], [0], [2], [2, 0, 1], [3]]
    mixed = grouped_triton.Mixed(pairs, rows)
    for turn in range(2 if tokens == 1 else 1):
        if turn:
            pairs[0][0].mul_(2)  # other numbers in the same memory
        found = mixed.beside(x, y)
        for row, numbers in enumerate(rows):
            wanted = y[row].double()
            for A, B, scale in (pairs[number] for number in numbers):
                wanted = wanted + scale * x[row].double() @ A.double().T @ B.double().T
            near(found[row], wanted.to(dtype))
        assert torch.equal(found[2], y[2])


# layers on them


@pytest.fixture
def both(monkeypatch):
    """run() by torch, run() by the kernels, and the names of those."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "missing", lambda: None)
    monkeypatch.setattr(lora_cpu, "fits", lambda x: False)  # the C part, which a GPU has not
    used = set()

    def note(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (used.add(name), function(*args))[1])

    for name in ("down", "into", "across", "up", "few", "drop"):
        note(lora_triton, name)
    note(grouped_triton.Mixed, "beside")

    def run(way):
        answers = []
        for name in ("reference", "triton"):
            used.clear()
            kernels.request(name)
            torch.manual_seed(5)
            answers.append(way())
        return *answers, set(used)

    yield run
    kernels.request(None)


def tensors(tokens=(2, 5), width=14, out=11, rank=3):
    torch.manual_seed(0)
    shapes = (*tokens, width), (*tokens, out), (rank, width), (out, rank)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(answer, inputs, **options):
    return torch.autograd.grad(answer.float().pow(2).sum(), inputs, **options)


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("tokens", [(2, 5), (1,), (0,)])
def test_gradients(tokens, drop, both):
    inputs = tensors(tokens)
    plain, ours, used = both(lambda: gradients(lora.beside(*inputs, 0.7, drop), inputs))
    assert used == {"down", "up", "into", "across"}
    for a, b in zip(ours, plain, strict=True):
        near(a, b)


@pytest.mark.parametrize("drop", DROPS)
def test_gradients_of_gradients_are_torchs_own(drop, both):
    inputs = tensors()

    def twice():
        first = gradients(lora.beside(*inputs, 0.7, drop), inputs, create_graph=True)
        return torch.autograd.grad(sum(each.pow(2).sum() for each in first), inputs)

    plain, ours, used = both(twice)
    assert {"down", "up"} <= used
    for a, b in zip(ours, plain, strict=True):
        near(a, b)


def test_what_is_recomputed_has_the_same_bits(both):
    inputs = tensors()
    run = lambda x, *rest: lora.beside(x, *rest, 0.7, dropout.draw(x, 0.4))  # noqa: E731

    def recomputed():
        found = []
        for make in (run, lambda *args: checkpoint(run, *args, use_reentrant=False)):
            torch.manual_seed(3)
            found.append(gradients(make(*inputs), inputs))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    assert both(recomputed)[2] == {"down", "up", "into", "across"}


@pytest.mark.parametrize("drop", DROPS)
def test_under_autocast_products_have_its_dtype(drop, both):
    x, y, A, B = inputs = tensors()

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            answer = lora.beside(x, y.bfloat16(), A, B, 0.7, drop)
        assert answer.dtype == torch.bfloat16
        return gradients(answer, inputs)

    plain, ours, used = both(cast)
    assert used == {"down", "up", "into", "across"}
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2 * NEAR[torch.bfloat16] * b.norm()


def test_compiled_code_is_one_graph_and_torchs_own(both):
    inputs = tensors()
    compiled = torch.compile(lambda *args: lora.beside(*args, 0.7, DROPS[1]), fullgraph=True, backend="aot_eager")
    plain, ours, used = both(lambda: (torch.compiler.reset(), gradients(compiled(*inputs), inputs))[1])
    assert used == {"drop"}, "an operator of its own"
    for a, b in zip(ours, plain, strict=True):
        near(a, b)


class Model(nn.Module):
    """One layer."""

    def __init__(self, out):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(12, out)

    def forward(self, x):
        return self.layer(x)


METHODS = [veneer.DoRA(rank=2, dropout=0.3), veneer.VeRA(rank=4, dropout=0.3), veneer.LoRA(rank=2, dropout=0.3)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods(method, both):
    model, x = Model(12), torch.randn(3, 12)
    adapter = veneer.attach(model, method, where="layer")
    perturb(adapter)

    def step():
        model.zero_grad()
        model(x).pow(2).sum().backward()
        return [parameter.grad for parameter in adapter.parameters()]

    plain, ours, used = both(step)
    assert {"down", "up"} <= used
    for a, b in zip(ours, plain, strict=True):
        near(a, b)


def test_dropout_alone(both):
    x = torch.randn(3, 7, requires_grad=True)

    def step():
        y = DROPS[1](x)
        return y, *torch.autograd.grad(y.pow(3).sum(), x)

    plain, ours, used = both(step)
    assert used == {"drop"}
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@torch.no_grad()
def test_few_tokens(both):
    x, y, A, B = tensors((2, 1))
    plain, ours, used = both(lambda: lora._few(x, y, A, B, 0.7))
    assert used == {"few"}
    near(ours, plain)


@torch.no_grad()
def test_rows_of_a_batch(both):
    model, x = Model(9).eval(), torch.randn(5, 3, 12)
    for name, rank in (("a", 2), ("b", 5)):
        perturb(veneer.attach(model, veneer.LoRA(rank=rank, alpha=3.0), where="layer", name=name))

    def answer(rows):
        with veneer.use(model, rows=rows):
            return model(x), model(x.repeat_interleave(2, 0))[::2]

    plain, ours, used = both(lambda: answer(["a", None, ("a", "b"), "b", "a"]))
    assert used == {"beside"}
    for a, b in zip(ours, plain, strict=True):
        near(a, b)
    plain, ours, used = both(lambda: answer([None] * 5))
    assert not used
    assert torch.equal(ours[0], plain[0])
