"""Every NF4 kernel gives the reference's numbers bit for bit, runs where it was asked for, and keeps nothing dense."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES
from torch import nn

import veneer
from veneer.errors import PlaceError
from veneer.formats.nf4 import NF4Linear
from veneer.ops import nf4, nf4_cpu, nf4_kernels
from veneer.quantizing import BLOCKS

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""With the integers that have their bits."""
SHAPES = [(64, 64), (37, 129), (3, 5), (1, 1), (2, 65)]
SCALES = [0.02, 1e5, 1e-6, 1e-8, 1e-39]
"""Products that are normal, infinite, subnormal and zero in float16, and subnormal in float32."""
ON_CPU = [name for name, kernel in nf4_kernels.KERNELS.items() if kernel.missing("cpu") is None]
WIDTHS = range(nf4_cpu.vectors() + 1) if "c" in ON_CPU else ()
"""The vectors that this machine has, from none to the widest."""
built = pytest.mark.skipif("c" not in ON_CPU, reason=f"{nf4_cpu.missing('cpu')}")


def weight(shape, scale=0.02, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def same_bits(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one.view(DTYPES[one.dtype]), other.view(DTYPES[one.dtype]))


def same_packed(one, other):
    for field in dataclasses.fields(nf4.Packed):
        mine, its = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(mine, its) if isinstance(mine, torch.Tensor) else mine == its, field.name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_c_kernel_is_there_where_there_is_a_compiler():
    assert ("c" in ON_CPU) or not (shutil.which("cc") or shutil.which("gcc")), nf4_cpu.missing("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_give_the_numbers_of_the_reference(name, double, dtype):
    for shape in [(64, 64), (37, 129), (3, 5), (1, 1)]:
        for block in BLOCKS:
            packed = nf4.quantize(weight(shape), block, double)
            same_bits(nf4_kernels.dequantize(packed, dtype, name), nf4.dequantize(packed, dtype))


@built
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 64)])
@pytest.mark.parametrize("width", WIDTHS)
def test_c_makes_the_same_weights_with_all_vectors(width, shape, double):
    for block in (32, 64, 4096):
        for scale in SCALES:
            packed = nf4.quantize(weight(shape, scale), block, double)
            for dtype in DTYPES:
                same_bits(nf4_cpu.dequantize(packed, dtype, width), nf4.dequantize(packed, dtype))


@built
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_c_packs_the_same_bytes_with_all_vectors(width, shape, dtype):
    for block in (32, 64, 4096):
        for scale in SCALES:
            dense = weight(shape, scale, dtype)
            if dense.isfinite().all():
                for double in (False, True):
                    same_packed(nf4_cpu.quantize(dense, block, double, width), nf4.quantize(dense, block, double))


@built
@pytest.mark.parametrize("count", [2, 3, 500])
def test_c_does_the_same_on_several_threads(count, threads):
    dense = weight((1600, 1001))  # enough for three, and a last block that is not whole
    wanted = nf4.quantize(dense)
    threads(count)
    same_packed(nf4_cpu.quantize(dense, 64, True), wanted)
    for dtype in DTYPES:
        same_bits(nf4_cpu.dequantize(wanted, dtype), nf4.dequantize(wanted, dtype))


@built
@pytest.mark.parametrize("width", WIDTHS)
def test_ties_and_their_neighbours_go_to_the_level_of_the_reference(width):
    middles = nf4.middles(nf4.levels())
    near = [middles, middles.nextafter(torch.ones(15)), middles.nextafter(-torch.ones(15))]
    dense = torch.cat([*near, nf4.levels(), torch.zeros(3)])  # a block of 64 whose largest magnitude is one
    wanted = nf4.quantize(dense)
    same_packed(nf4_cpu.quantize(dense, 64, True, width), wanted)
    codes = torch.stack([wanted.data >> 4, wanted.data & 15], -1).flatten()
    assert codes[:15].tolist() == list(range(15)), "a middle goes to the lower level"
    assert codes[15:30].tolist() == list(range(1, 16))


@built
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_c_makes_some_rows_and_columns(width, double, threads):
    packed = nf4.quantize(weight((700, 1024)), 64, double)
    for dtype in DTYPES:
        whole, memory = nf4.dequantize(packed, dtype), torch.empty(700 * 1024, dtype=dtype)
        for rows, columns in [(range(3, 690), range(1024)), (range(700), range(128, 960)), (range(5, 6), range(64))]:
            for count in (1, 2):
                threads(count)
                found = nf4_cpu.tile(packed, rows, columns, memory, width)
                same_bits(found, whole[rows.start : rows.stop, columns.start : columns.stop].contiguous())


@built
def test_what_is_not_contiguous_is_read_as_it_stands():
    dense = weight((128, 96)).T
    same_packed(nf4_cpu.quantize(dense, 64, True), nf4.quantize(dense))


def test_the_fastest_is_chosen_and_named():
    assert nf4_kernels.chosen("cpu") == ON_CPU[0]
    layer = NF4Linear(nn.Linear(64, 8), 64, True)
    assert f"kernel={ON_CPU[0]}" in repr(layer)
    assert "kernel=table" in repr(NF4Linear(nn.Linear(64, 8), 64, True, "table"))
    assert nf4_kernels.chosen("cpu", torch.float64) == "reference"
    assert layer.double()(weight((2, 64), dtype=torch.float64)).dtype == torch.float64


def test_a_kernel_that_fails_is_an_error_and_no_other_takes_its_place(monkeypatch):
    def fails(*_):
        raise RuntimeError("the driver is gone")

    broken = nf4_kernels.Kernel(fails)
    monkeypatch.setattr(nf4_kernels, "KERNELS", {ON_CPU[0]: broken, "reference": nf4_kernels.KERNELS["reference"]})
    layer = NF4Linear(nn.Linear(64, 8), 64, True)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        layer(torch.ones(1, 64))
    layer.kernel = "reference"
    assert layer(torch.ones(1, 64)).isfinite().all()


def test_a_kernel_asked_for_by_name_runs_or_raises():
    with pytest.raises(PlaceError, match=r"no NF4 kernel 'tritn'. Choose one of c, bitsandbytes, triton"):
        veneer.NF4(kernel="tritn")
    model = FAMILIES["llama"].model().float()
    with pytest.raises(PlaceError, match=r"'triton'.* cannot run on cpu: it is for CUDA"):
        veneer.quantize(model, veneer.NF4(kernel="triton"))
    assert not any(isinstance(module, NF4Linear) for module in model.modules()), "refused before anything is changed"
    veneer.quantize(model, veneer.NF4(kernel="table"))
    assert {module.kernel for module in model.modules() if isinstance(module, NF4Linear)} == {"table"}
    layer = NF4Linear(nn.Linear(64, 8), 64, True, "table")
    with pytest.raises(PlaceError, match=r"'table'.* it does not make torch\.float64"):
        layer(torch.ones(1, 64, dtype=torch.float64))


def test_without_the_library_the_others_are_left(monkeypatch):
    monkeypatch.setattr(nf4_cpu, "_library", lambda: None)
    nf4_kernels.chosen.cache_clear()
    try:
        assert nf4_kernels.chosen("cpu") == "bitsandbytes"
        layer = NF4Linear(nn.Linear(64, 8), 64, True)
        assert layer(torch.ones(1, 64)).isfinite().all()
        layer.kernel = "c"
        with pytest.raises(PlaceError, match="reinstall Veneer where there is a C compiler"):
            layer(torch.ones(1, 64))
    finally:
        nf4_kernels.chosen.cache_clear()


def counted(name, sizes):
    """The kernel of that name, which writes down how many values it makes."""
    kernel = nf4_kernels.KERNELS[name]

    def noted(dense):
        sizes.append(dense.numel())
        return dense

    return nf4_kernels.Kernel(
        lambda *arguments: noted(kernel.dequantize(*arguments)),
        kernel.missing,
        kernel.tile and (lambda *arguments: noted(kernel.tile(*arguments))),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ON_CPU)
def test_forward_and_backward_make_each_weight_once_and_keep_none(name, dtype, monkeypatch):
    monkeypatch.setattr(nf4_kernels, "PIECE", 1 << 12)
    layer = NF4Linear(nn.Linear(256, 192, bias=False).to(dtype), 64, True, name)
    sizes, saved = [], []
    monkeypatch.setitem(nf4_kernels.KERNELS, name, counted(name, sizes))
    x = torch.randn(2, 3, 256, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert sum(t.numel() * t.element_size() for t in saved) == 0, (
        "the packed weight is the layer's, and x is not needed"
    )
    assert sum(sizes) == 192 * 256
    y.sum().backward()
    assert sum(sizes) == 2 * 192 * 256
    if name == "c":
        assert max(sizes) <= max(1 << 12, 192 * 64) * torch.get_num_threads(), "no whole weight is ever dense"
    dense = layer.dense(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, F.linear(x, dense), **close)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 3, -1), **close)


def test_gradients_of_gradients():
    layer = NF4Linear(nn.Linear(64, 8, bias=False), 64, True)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).pow(2), x)


def test_autocast_makes_the_weight_in_its_dtype():
    layer = NF4Linear(nn.Linear(64, 8, bias=False), 64, True)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    same_bits(y, F.linear(x.bfloat16(), layer.dense(torch.bfloat16)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("name", [None, "table"])
def test_a_compiled_layer_is_one_graph(name):
    torch.compiler.reset()
    layer = NF4Linear(nn.Linear(64, 8), 64, True, name)
    x = torch.randn(3, 64, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    same_bits(y, layer(x))
    same_bits(torch.autograd.grad(y.sum(), x)[0], wanted)
    same_bits(torch.compile(layer.dense, fullgraph=True, backend="aot_eager")(), layer.dense())
