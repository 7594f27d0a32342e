"""Triton's kernels for low-rank pairs: their numbers in Triton's interpreter, their code for two GPUs, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.ops import dropout, kernels, lora

pytest.importorskip("triton", reason="Triton is not installed: its kernels go untested. Install veneer[test] on Linux.")

INTERPRETED = Path(__file__).with_name("interpreted_lora.py")


def test_numbers_are_those_of_the_reference_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # read when Triton is imported, so this needs a new process
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]


SIZES = dict.fromkeys(("tokens", "width", "rank"), "i32")
DRAW = {"seed": "*i64", "threshold": "i32"}
STRIDES = dict.fromkeys(("by_rank", "by_column"), "i32")
MIXED = dict.fromkeys(("pairs", "order", "starts"), "*i64") | {"like": "*fp32"}
MORE = {"depth": "i32", "widest": "i32"}


def signatures(dtype):
    """The arguments of each kernel, as a launch on a layer in this dtype with adapters in float32 gives them."""
    x = f"*{dtype}"
    return {
        "narrow": {"x": x, "A": "*fp32", "h": x, **DRAW, **SIZES, **STRIDES},
        "widen": {"h": x, "factor": "*fp32", "y": x, "to": x, **DRAW, "scale": "fp32", **SIZES, **STRIDES},
        "outer": {"h": x, "x": x, "sums": "*fp32", **DRAW, **SIZES, "split": "i32"},
        "one": {"x": x, "A": "*fp32", "B": "*fp32", "y": x, "to": x, "scale": "fp32"}
        | dict.fromkeys(("width", "out", "rank"), "i32"),
        "zero": {"x": x, "to": x, **DRAW, "count": "i32"},
        "shrink": {"x": x, "h": "*fp32", **MIXED, "tokens": "i32", "width": "i32", **MORE},
        "expand": {"h": "*fp32", "y": x, "to": x, "scales": "*fp32", "turns": "*i64", **MIXED}
        | {"tokens": "i32", "out": "i32", **MORE},
    }


@pytest.mark.parametrize("name", signatures("bf16"))
@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 80), ("bf16", 90), ("fp32", 90)])
def test_it_compiles_within_what_a_gpu_has(name, dtype, capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from veneer.ops import grouped_triton, lora_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(lora_triton, name, None) or getattr(grouped_triton, name)
    known = lora_triton.tile(4096, 64, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    known |= {"dropping": True, "even": True, "adding": True, "aligned": 16}
    known |= {"one": {"columns": 512, "outs": 64, "ranks": 16}, "zero": {"tile": lora_triton.ITEMS}}.get(name, {})
    given = signatures(dtype)[name]
    constants = {each: known[each] for each in kernel.arg_names if each not in given}
    signature = {each: given.get(each, "constexpr") for each in kernel.arg_names}
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind == "i32" or kind[0] == "*"
    }  # as a launch finds them to be
    source = ASTSource(kernel, signature, constants, even)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=lora_triton.FUSED)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 99 << 10, "more than every GPU has since Ampere"
    multiplies = name not in ("one", "zero") and dtype == "bf16"
    assert ("mma" in made.asm["ptx"]) == multiplies, "float32 is not rounded for tensor cores"


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the Triton kernels were not run on one")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def asked():
    """Triton's kernels, asked for by name."""
    kernels.request("triton")
    yield
    kernels.request(None)


@on_gpu
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("tokens", [(1,), (3, 130)])
def test_values_and_gradients_on_a_gpu(tokens, dtype, p, asked):
    torch.manual_seed(0)
    shapes = (*tokens, 70), (*tokens, 37), (3, 70), (37, 3)
    inputs = [torch.randn(shape, device="cuda") for shape in shapes]
    inputs = [each.to(dtype) if place < 2 else each for place, each in enumerate(inputs)]
    drop = dropout.draw(inputs[0], p)

    def step():
        leaves = [each.detach().requires_grad_() for each in inputs]
        y = lora.beside(*leaves, 0.7, drop)
        return y, *torch.autograd.grad(y.float().pow(2).sum(), leaves)

    ours = step()
    kernels.request("reference")
    for a, b in zip(ours, step(), strict=True):
        assert (a.double() - b.double()).norm() <= CLOSE[dtype] * b.double().norm()
    kernels.request("triton")
    assert torch.equal(drop(inputs[0]), inputs[0] if not p else dropout.reference(inputs[0], drop.seed, drop.threshold))


@on_gpu
@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_rows_and_few_tokens_on_a_gpu(tokens, asked):
    from veneer.ops.grouped_triton import Mixed

    torch.manual_seed(0)
    x, y = torch.randn(5, tokens, 48, device="cuda"), torch.randn(5, tokens, 33, device="cuda")
    pairs = [(torch.randn(r, 48, device="cuda"), torch.randn(33, r, device="cuda"), 0.5) for r in (8, 3, 64)]
    rows = [[0], [1, 2], [], [0], [2]]
    found = Mixed(pairs, rows).beside(x, y)
    for row, numbers in enumerate(rows):
        wanted = y[row]
        for A, B, scale in (pairs[number] for number in numbers):
            wanted = lora._few(x[row], wanted, A, B, scale)
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-3)


@on_gpu
def test_a_trial_on_a_gpu_chooses_one_without_a_warning(monkeypatch):
    monkeypatch.setattr(kernels, "_found", {})
    x, A = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16), torch.randn(8, 256, device="cuda")
    with torch.no_grad():
        lora.down(x, A, x.dtype, dropout.draw(x, 0.1))
    assert any(choice.kind.startswith("down on cuda") and choice.milliseconds for choice in kernels.choices())
