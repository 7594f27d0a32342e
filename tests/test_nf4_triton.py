"""The Triton kernel: its numbers in Triton's interpreter, its code for two GPUs, and itself where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from veneer.ops import nf4, nf4_kernels

pytest.importorskip(
    "triton", reason="Triton is not installed: its kernel goes untested. Install veneer[test] on Linux."
)

INTERPRETED = """
import torch
from veneer.ops import nf4, nf4_triton

seen = 0
for shape in [(64, 64), (37, 129), (3, 5), (1, 1), (2, 65), (0, 64)]:
    for scale in (0.02, 1e-6, 1e-39):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
        for block in (32, 64, 4096):
            for double in (False, True):
                packed = nf4.quantize(weight, block, double)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    found, wanted = nf4_triton.dequantize(packed, dtype), nf4.dequantize(packed, dtype)
                    assert found.dtype == dtype and torch.equal(found, wanted), (shape, scale, block, double, dtype)
                    seen += 1
print(seen)
"""


def test_its_numbers_are_those_of_the_reference_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # read when Triton is imported, so this needs a new process
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == str(6 * 3 * 3 * 2 * 3), run.stderr[-2000:]


@pytest.mark.parametrize("dtype", ["fp32", "i16", "fp16"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_fused_rounding_and_writes_four_words_at_a_time(
    capability, double, dtype, tmp_path, monkeypatch
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from veneer.ops.nf4_triton import TILE, kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tables = dict.fromkeys(("inner", "outer", "offset", "levels"), "*fp32")
    sizes = {"block": 64, "group": nf4.OUTER, "double": double, "tile": TILE}
    signature = {"codes": "*u8", "absmax": "*u8" if double else "*fp32", **tables, "dense": f"*{dtype}", "count": "i32"}
    even = {(place,): [["tt.divisibility", 16]] for place in range(len(signature))}  # as a launch finds them to be
    source = ASTSource(kernel, {**signature, **dict.fromkeys(sizes, "constexpr")}, sizes, even)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    assert made.asm["cubin"]
    assert "fma" not in made.asm["ptx"]
    assert ".ftz" not in made.asm["ptx"], "subnormal values would be lost"
    assert "st.global.v4.b32" in made.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the Triton kernel was not run on one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
def test_its_numbers_are_those_of_the_reference_on_a_gpu(double, dtype):
    for shape in [(64, 64), (37, 129), (1, 1), (600, 1001)]:
        for block in (32, 64, 4096):
            packed = nf4.quantize(torch.randn(shape, device="cuda") * 0.02, block, double)
            found = nf4_kernels.dequantize(packed, dtype, "triton")
            assert torch.equal(found, nf4.dequantize(packed, dtype))
