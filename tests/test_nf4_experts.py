"""Experts in NF4: their bytes, every law on them, what stays dense, merging, folders, and what a step keeps."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from laws import Case
from safetensors.torch import load_file, save_file
from subjects import SUBJECTS
from test_experts import BUILD, EXPERTS, WHERE, answer
from test_experts import moe as dense
from test_quantized_laws import MADE
from tiny import SIZES, Family, logits, perturb, text
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import veneer
from veneer import formats
from veneer.errors import AdapterError, CorruptFile, MethodError, NotMergeable, PlaceError
from veneer.formats.nf4_experts import NF4Experts
from veneer.formats.nf4_storage import Holder
from veneer.ops import grouped, nf4, nf4_kernels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes says at import which kernels it does without on a CPU
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

PATH = "model.layers.1.mlp.experts"
STACKS = ("gate_up_proj", "down_proj")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def moe(kind: str = "mixtral", dtype: torch.dtype = torch.float32, skip=(), **options) -> nn.Module:
    return veneer.quantize(dense(kind, "eager", dtype), veneer.NF4(**options), skip=skip)


def twin(model: nn.Module, kind: str, way: str = "eager") -> nn.Module:
    """The dense model with the weights that a quantized one stands for, computed in one of transformers' ways."""
    other = dense(kind, way, torch.float32)
    for path, module in model.named_modules():
        form = formats.of(module)
        for _, name in form.weights(module) if isinstance(module, Holder) else ():
            plain = other.get_submodule(path)
            formats.of(plain).write(plain, name, form.read(module, name))
    return other


def adapted(model: nn.Module, method: veneer.Method | None = None, where: str = WHERE) -> veneer.Adapter:
    torch.manual_seed(1)
    adapter = veneer.attach(model, method or veneer.LoRA(rank=2, alpha=4.0), where)
    perturb(adapter, 0.1)
    return adapter


def gradients(model: nn.Module, adapter: veneer.Adapter) -> list[torch.Tensor]:
    model.zero_grad()
    logits(model, text()).pow(2).mean().backward()
    return [parameter.grad.clone() for parameter in adapter.parameters()]


def same(one: nn.Module, other: nn.Module) -> None:
    mine, its = one.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == its[key].dtype, key
        assert torch.equal(tensor, its[key]), key


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", BUILD)
def test_it_computes_what_transformers_computes(kind, way):
    """The base, and the gradients that pass it, as each of transformers' ways has them on the same numbers."""
    model = moe(kind)
    other = twin(model, kind, way)
    torch.testing.assert_close(answer(model), answer(other), **CLOSE)
    grads = [gradients(one, adapted(one, where="attention.q")) for one in (model, other)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)


METHODS = {
    "LoRA": veneer.LoRA(rank=2),
    "PiSSA": veneer.LoRA(rank=2, init="pissa"),
    "LoRAFA": veneer.LoRAFA(rank=2),
    "HiRA": veneer.HiRA(rank=2),
    "DoRA": veneer.DoRA(rank=2),
    "OLoRA": veneer.LoRA(rank=2, init="olora"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", BUILD)
def test_a_method_computes_what_it_computes_on_the_dense_twin(kind, name):
    """Low-rank changes beside the stacks, others inside them; PiSSA's factors are two parts of one pair."""
    model = moe(kind)
    other = twin(model, kind)
    adapters = [adapted(one, METHODS[name]) for one in (model, other)]
    torch.testing.assert_close(answer(model), answer(other), **CLOSE)
    grads = [gradients(one, adapter) for one, adapter in zip((model, other), adapters, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("where", ["mlp.gate", "mlp.up", "*.down_proj"])
def test_a_role_changes_its_own_outputs(where):
    model = moe("qwen3_moe")
    other = twin(model, "qwen3_moe", "grouped_mm")
    adapters = [adapted(one, where=where) for one in (model, other)]
    assert [claim.place.path for claim in adapters[0].claims] == [claim.place.path for claim in adapters[1].claims]
    torch.testing.assert_close(answer(model), answer(other), **CLOSE)


def test_loftq_makes_up_for_what_quantizing_took():
    model, plain = moe(), dense("mixtral", dtype=torch.float32)
    lost = (answer(model) - answer(plain)).norm()
    adapter = veneer.attach(model, veneer.LoRA(rank=16, init="loftq"), f"{WHERE} | linear")
    veneer.calibrate(model, adapter, plain)
    assert (answer(model) - answer(plain)).norm() < 0.8 * lost


def test_a_watched_delta_is_called():
    model = moe()
    adapted(model)
    assert veneer.check(model, text()) == []


@dataclass(frozen=True)
class Packed(Family):
    """A mixture in NF4, experts and all."""

    kind: str = ""

    def model(self) -> nn.Module:
        """A fresh one, frozen nowhere, in evaluation mode."""
        return moe(self.kind)


@pytest.mark.parametrize("law", MADE, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kind", BUILD)
def test_laws(kind, law):
    subject = SUBJECTS["LoRA-experts"]
    case = Case(Packed(None, text, generates=True, kind=kind), subject.method, subject.where)
    impossible = subject.stated(law.__name__, "mixtral")
    if impossible is None:
        law(case)
    else:
        with pytest.raises(impossible[0], match=impossible[1]):
            law(case)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", BUILD)
def test_keys_and_bytes_are_those_of_bitsandbytes(kind, double):
    """Its parametrization of a single parameter names them so."""
    model, theirs = moe(kind, double_quant=double), dense(kind, "eager", torch.float32).get_submodule(PATH)
    for name in STACKS:
        replace_parameter_4bit(theirs, name, compress_statistics=double, quant_type="nf4", blocksize=64)
    mine, its = model.get_submodule(PATH).state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, its[key]), key


def test_bits_are_counted_by_their_bytes():
    """4.127 a weight in blocks of 64, and nothing of a module's stacks beside that."""
    packed = nf4_kernels.quantize(torch.randn(2, 1024, 1024), 64, True)
    assert round(packed.bits, 3) == 4.127
    model, plain = moe(), dense("mixtral")
    assert veneer.count_parameters(model).total == veneer.count_parameters(plain).total
    module = model.get_submodule(PATH)
    stored = [*module.parameters(), *module.buffers()]
    assert sum(t.nbytes for t in stored) == sum(module.held(name).size for name in STACKS)


@pytest.mark.parametrize("kernel", [None, "bitsandbytes", "table", "reference"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4, 64, 128), (3, 24, 32), (3, 5, 7)])
def test_a_product_by_group_is_that_of_each_matrix(shape, transposed, kernel):
    """Matrices of whole blocks are made dense apart, others together; a group without rows is passed over."""
    torch.manual_seed(0)
    packed = nf4_kernels.quantize(torch.randn(shape), 64, True)
    whole = nf4_kernels.dequantize(packed, torch.float32)
    assert nf4.apart(packed) is (math.prod(shape[1:]) % 64 == 0)
    ends = torch.tensor([3, 3, *[8] * (shape[0] - 2)])
    x = torch.randn(8, shape[1 if transposed else 2], requires_grad=True)
    stack = whole.mT if transposed else whole
    y = nf4_kernels.multiply_grouped(x, packed, ends, transposed, kernel)
    expected = torch.cat([x[:3] @ stack[0].T, x[3:] @ stack[2].T])
    torch.testing.assert_close(y, expected, **CLOSE)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g), **CLOSE)


def test_a_dense_product_by_group_has_its_gradients():
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    stack = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 6])
    assert torch.autograd.gradcheck(lambda x, stack: grouped.multiply(x, stack, ends), (x, stack))


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that any operation gives, and how often each kind of operation ran."""

    def __init__(self):
        super().__init__()
        self.most, self.runs = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.runs[func.name()] = self.runs.get(func.name(), 0) + 1
        floats = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
        self.most = max([self.most, *(t.numel() for t in floats if t.is_floating_point())])
        return result


def test_nothing_dense_is_kept_or_made_whole():
    """Forward and backward each multiply every stack once, and autograd keeps neither stacks nor single experts."""
    model = moe("mixtral")
    adapted(model)
    kept = []
    keep = lambda tensor: kept.append(set(tensor.shape[-2:])) or tensor  # noqa: E731
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = logits(model, text()).pow(2).mean()
        loss.backward()
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    # layers, stacks, forward and backward, but for the gradient to the first input, which nothing trains below
    assert seen.runs["veneer::nf4_grouped"] == 2 * 2 * 2 - 1
    assert {width, inner} not in kept
    assert {width, 2 * inner} not in kept
    assert seen.most < EXPERTS * width * inner, "a whole stack was made dense"


def test_other_changes_keep_no_stack_either():
    model = moe("mixtral")
    adapted(model, veneer.HiRA(rank=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        logits(model, text()).pow(2).mean()
    assert max(kept) < EXPERTS * SIZES["hidden_size"] * SIZES["intermediate_size"]


def test_what_is_no_expert_stays_dense_and_what_is_skipped_too():
    model = moe("mixtral", torch.bfloat16)
    router = model.get_submodule("model.layers.0.mlp.gate")
    assert not isinstance(router, Holder)
    assert router.weight.dtype == torch.bfloat16
    assert type(model.get_submodule(PATH)) is NF4Experts
    linears = veneer.quantize(dense("mixtral", dtype=torch.float32), veneer.NF4(), where="linear")
    assert type(linears.get_submodule(PATH)) is not NF4Experts
    skipped = moe("mixtral", skip=["layers.0.mlp.experts.*", "layers.1.*.gate_up_proj"])
    assert type(skipped.get_submodule(PATH.replace("1", "0"))) is not NF4Experts
    assert list(skipped.get_submodule(PATH).facts) == ["down_proj"]
    torch.testing.assert_close(answer(skipped), answer(twin(skipped, "mixtral")), **CLOSE)
    adapter = adapted(skipped)
    before = answer(skipped)
    veneer.merge(skipped, adapter)
    torch.testing.assert_close(answer(skipped), before, **CLOSE)


def test_what_cannot_be_is_refused_by_name():
    model = dense("mixtral", dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule(PATH).down_proj[1, 0, 0] = float("nan")
    with pytest.raises(PlaceError, match=r"layers\.1\.mlp\.experts\.down_proj has weights that are not finite"):
        veneer.quantize(model, veneer.NF4())
    assert type(model.get_submodule(PATH)) is not NF4Experts
    model = dense("mixtral", dtype=torch.float32)
    vars(model.get_submodule(PATH))["_is_expert_parallel"] = True
    with pytest.raises(PlaceError, match=r"experts\.gate_up_proj is no stack .*Name it in skip"):
        veneer.quantize(model, veneer.NF4())
    model = moe()
    with pytest.raises(MethodError, match=r"FullFineTuning at .*experts\.(gate_up|down)_proj"):
        veneer.attach(model, veneer.FullFineTuning(), where="experts")
    module = model.get_submodule(PATH)
    with pytest.raises(NotMergeable, match=r"Merge with veneer\.merge"):
        formats.of(module).write(module, "down_proj", torch.zeros(1))
    vars(module)["forward"] = module.forward
    adapter = adapted(model)
    with pytest.raises(NotMergeable, match=r"experts\.gate_up_proj: .*offloading"):
        veneer.merge(model, adapter)


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("kind", BUILD)
def test_merging_is_dense_unless_asked_and_comes_back(kind, requantize):
    model = moe(kind, torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = adapted(model)
    unmerged = answer(model)
    drift = veneer.merge(model, adapter, requantize=requantize, check=text())
    module = model.get_submodule(PATH)
    assert isinstance(module, NF4Experts) is requantize
    if not requantize:
        assert type(module) is type(dense(kind).get_submodule(PATH))
        assert module.down_proj.dtype == torch.bfloat16
    assert drift.divergence > 0
    veneer.unmerge(model, adapter)
    assert torch.equal(answer(model), unmerged)
    veneer.detach(model, adapter)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_packing_the_sum_again_costs_more():
    drifts = []
    for requantize in (False, True):
        model = moe("mixtral", torch.bfloat16)
        drifts.append(veneer.merge(model, adapted(model), requantize=requantize, check=text()).divergence)
    assert 5 * drifts[0] < drifts[1], drifts


def test_a_model_is_made_dense_again():
    model = moe()
    other = twin(model, "mixtral")
    veneer.dequantize(model)
    same(model, other)
    assert type(model.get_submodule(PATH)) is type(other.get_submodule(PATH))


@pytest.mark.parametrize("kind", BUILD)
def test_folders(kind, tmp_path):
    """Loading gives the bytes of quantizing in place, whatever a file has of the experts; a folder gives them again."""
    dense(kind, "grouped_mm", torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    loaded = veneer.load_quantized(tmp_path / "dense")
    assert isinstance(loaded.get_submodule(PATH), NF4Experts)
    same(veneer.quantize(model, veneer.NF4()), loaded)
    assert torch.equal(answer(loaded), answer(model))
    veneer.save_quantized(loaded, tmp_path / "packed")
    again = veneer.load_quantized(tmp_path / "packed")
    same(loaded, again)
    assert torch.equal(answer(again), answer(model))
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
    keys = load_file(tmp_path / "packed" / "model.safetensors").keys()
    assert {f"{PATH}.{name}.quant_state.bitsandbytes__nf4" for name in STACKS} <= keys
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # transformers knows no experts of so few bits
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_folder_may_have_some_experts_dense(tmp_path):
    model = veneer.quantize(dense("mixtral", dtype=torch.bfloat16), veneer.NF4(), skip=["layers.0.mlp.experts"])
    veneer.save_quantized(model, tmp_path / "packed")
    same(model, veneer.load_quantized(tmp_path / "packed"))


def test_a_broken_folder_is_refused_by_name(tmp_path):
    veneer.save_quantized(moe("mixtral", torch.bfloat16), tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    whole = load_file(path)
    for lost, message in [
        (f"{PATH}.down_proj.absmax", r"experts\.down_proj\.absmax is missing"),
        (f"{PATH}.down_proj", r"experts\.down_proj"),
    ]:
        kept = {key: tensor for key, tensor in whole.items() if key != lost and not key.startswith(f"{lost}.")}
        save_file(kept, path, metadata={"format": "pt"})
        with pytest.raises(CorruptFile, match=message):
            veneer.load_quantized(tmp_path / "packed")


def test_an_adapter_of_one_base_fits_the_other(tmp_path):
    model, plain = moe(), dense("mixtral", dtype=torch.float32)
    adapter = adapted(model)
    veneer.save(adapter, tmp_path / "adapter")
    loaded = veneer.load(plain, tmp_path / "adapter")
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key


def test_a_state_dict_goes_into_another_model():
    one, other = moe(double_quant=True), moe(double_quant=False)
    with torch.no_grad():
        other.get_submodule(PATH).down_proj.zero_()
    other.load_state_dict(one.state_dict())
    same(one, other)


def test_a_plan_has_experts_in_four_bits():
    """Every number of them, and the largest that is made dense at a time is one expert's."""
    options = {"dtype": torch.bfloat16, "sequence_length": 16}
    plans = [veneer.plan("mixtral:8x7b", veneer.LoRA(), quantization=kind, **options) for kind in (None, "nf4")]
    assert plans[0].total == plans[1].total == 46_702_792_704
    packed = plans[1].total - 2 * 32_000 * 4096  # less embeddings and head; norms and routers are too few to see
    expected = packed * 4.127 / 8 + 2 * 2 * 32_000 * 4096
    assert plans[1].memory["weights"].expected == pytest.approx(expected, rel=1e-3)
    assert plans[1].memory["dequantization"].expected == 2 * 14336 * 4096 * 2


def test_merging_twice_is_refused_as_ever():
    model = moe()
    adapter = adapted(model)
    veneer.merge(model, adapter)
    with pytest.raises(AdapterError, match="merged already"):
        veneer.merge(model, adapter)
