"""Veneer's NF4 linear answers as bitsandbytes' Linear4bit does on equal weights, forward and backward."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from veneer.formats.nf4 import NF4Linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes says at import which kernels it does without on a CPU
    import bitsandbytes as bnb


def theirs(dense: nn.Linear, double: bool) -> nn.Module:
    dtype, bias = dense.weight.dtype, dense.bias is not None
    options = {"quant_type": "nf4", "compress_statistics": double}
    linear = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=bias, compute_dtype=dtype, **options)
    linear.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, module=linear, **options)
    linear.bias = dense.bias
    linear.support_avx512bf16_for_cpu = False  # else it rounds its magnitudes in the first forward in evaluation
    return linear.to("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_outputs_and_gradients_are_equal(rows, dtype, double, bias):
    """In float32 up to the order of the sum; in bfloat16 up to one rounding of it."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 128, bias=bias).to(dtype)
    pair = NF4Linear(copy.deepcopy(dense), 64, double), theirs(copy.deepcopy(dense), double)
    answers, gradients, evaluated = [], [], []
    for linear in pair:
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = linear.train()(x)
        y.backward(torch.randn(rows, 128, generator=torch.Generator().manual_seed(2)).to(dtype))
        answers.append(y.detach())
        gradients.append(x.grad)
        with torch.no_grad():
            evaluated.append(linear.eval()(x))
        assert y.dtype == x.grad.dtype == dtype
    within = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-8}
    for ours, other in (answers, gradients, evaluated):
        torch.testing.assert_close(ours, other, **within)
