"""LoRA computes what Hugging Face PEFT's LoRA computes, and either reads the other's files."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dropping import same_dropout
from tiny import FAMILIES, perturb
from torch import Tensor, nn

import veneer

with warnings.catch_warnings():
    # peft imports every quantizer it finds, and some of those warn at import that they lack a kernel or a compiler
    warnings.simplefilter("ignore")
    import peft

# peft asks transformers' models for a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative to the largest entry of a tensor."""


class Layers(nn.Module):
    """One layer of every kind that PEFT's LoRA adapts, each of which changes the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.dense = nn.Linear(8, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1, dilation=1)
        self.conv2 = nn.Conv2d(1, 2, (3, 2), stride=(1, 2), padding="valid")
        self.conv3 = nn.Conv3d(2, 3, (1, 2, 2), padding=(0, 1, 0))
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.dense(self.table(ids))
        h = h + self.conv1(h.transpose(1, 2)).transpose(1, 2).tanh()
        image = self.conv2(h[:, None]).tanh()
        h = h + self.conv3(image[:, :, None]).tanh().mean((1, 2, 3, 4))[:, None, None]
        h = h + self.attn(h, h, h, need_weights=False)[0]
        return self.classifier(self.other(h).tanh())


@dataclass(frozen=True)
class Case:
    """The same adapter in both libraries' words."""

    model: str
    peft: dict[str, Any]
    lora: dict[str, Any]
    where: str
    also_train: tuple[str, ...] = ()
    common: dict[str, Any] = field(default_factory=dict)

    def base(self, dtype: torch.dtype) -> nn.Module:
        if self.model != "layers":
            return FAMILIES[self.model].model().to(dtype)
        torch.manual_seed(0)
        return Layers().to(dtype).eval()

    def answer(self, model: nn.Module) -> Tensor:
        if self.model == "layers":
            return model(torch.tensor([[1, 2, 3, 4, 9], [5, 0, 7, 7, 2]]))
        dtype = next(model.parameters()).dtype
        batch = FAMILIES[self.model].batch()
        return model(**{key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}).logits

    def config(self) -> peft.LoraConfig:
        return peft.LoraConfig(modules_to_save=list(self.also_train) or None, **self.common, **self.peft)

    def attach(self, model: nn.Module) -> veneer.Adapter:
        method = veneer.LoRA(**self.common, **self.lora)
        return veneer.attach(model, method, self.where, also_train=self.also_train)


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZE = ({"r": 4, "lora_alpha": 12}, {"rank": 4, "alpha": 12.0})
REGEX = r".*layers\.1\.(self_attn|mlp)\.(q|v|down)_proj"
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3.0, "o_proj": 5.0}}


def case(model: str, targets: list[str] | str, where: str, *also_train: str, **common: Any) -> Case:
    sizes, lora = SIZE
    fused = {"fan_in_fan_out": True} if model == "gpt2" else {}
    return Case(model, {"target_modules": targets, **sizes, **fused}, lora, where, also_train, common)


CASES = {
    "llama": case("llama", SEVEN, "linear"),
    "llama-rslora": case("llama", SEVEN, "linear", use_rslora=True),
    "llama-patterns": case("llama", SEVEN, "linear", **PATTERNS),
    "llama-rslora-patterns": case("llama", SEVEN, "linear", use_rslora=True, **PATTERNS),
    "llama-regex": case("llama", REGEX, f"re:{REGEX}"),
    "llama-all-linear": case("llama", "all-linear", "linear"),
    "llama-head-saved": case("llama", ["q_proj", "v_proj"], "attention.q | attention.v", "lm_head"),
    "gpt2": case("gpt2", ["c_attn", "c_proj"], "c_attn | c_proj"),
    "gpt2-lora_only": case("gpt2", ["c_attn", "c_proj"], "c_attn | c_proj", bias="lora_only"),
    "gpt2-all": case("gpt2", ["c_attn"], "c_attn", bias="all"),
    "bert": case("bert", ["query", "value"], "attention.q | attention.v"),
    "bert-lora_only": case("bert", ["query", "value"], "attention.q | attention.v", bias="lora_only"),
    "bert-all": case("bert", ["query", "value"], "attention.q | attention.v", bias="all"),
    "bert-saved": case("bert", ["query", "value"], "attention.q | attention.v", "transform"),
    "t5": case("t5", ["q", "v", "wo"], "*.q | *.v | *.wo"),
    "vit": case("vit", "all-linear", "linear | classifier"),
    "vit-saved": case("vit", r".*(q_proj|o_proj|fc1|fc2)", "q_proj | o_proj | fc1 | fc2", "classifier"),
    "layers": case("layers", ["table", "dense", "conv1", "conv2", "conv3", "attn"],
                   "table | dense | conv1 | conv2 | conv3 | attn", "classifier"),
    "layers-lora_only": case("layers", ["table", "dense", "conv1", "conv2", "conv3"],
                             "table | dense | conv1 | conv2 | conv3", "classifier", bias="lora_only"),
    "layers-all": case("layers", ["table", "dense", "conv1", "conv2", "conv3"],
                       "table | dense | conv1 | conv2 | conv3", "classifier", bias="all"),
    "layers-attention": case("layers", ["attn"], "attn", use_rslora=True),
}  # fmt: skip


def close(actual: Tensor, expected: Tensor, what: str = "output", floor: float = 0.0) -> None:
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE[expected.dtype] * max(expected.abs().max().item(), floor), f"{what} differs by {error}"


def backward(case: Case, model: nn.Module) -> Tensor:
    answer = case.answer(model)
    answer.pow(2).mean().backward()
    return answer.detach()


def peft_key(name: str) -> str:
    """PEFT's name of a parameter, in the words of `veneer_gradients`."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
    return re.sub(r"\.lora_(?:embedding_)?([AB])\.default(?:\.weight)?$", r".\1", name)


def peft_gradients(model: nn.Module) -> dict[str, Tensor]:
    named = {peft_key(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    for path, module in model.named_modules():
        key = f"{peft_key(path)}.out_proj.A"
        if isinstance(module, nn.MultiheadAttention) and key in named:
            # PEFT adds out_proj's change twice, but the second time past autograd: its gradients are those of one
            # addition. Veneer adds twice PEFT's B once, so A's true gradient is twice PEFT's, and B's the same.
            named[key] *= 2
    return named


def veneer_gradients(adapter: veneer.Adapter) -> dict[str, Tensor]:
    named = {}
    for claim in adapter.claims:
        for name, parameter in claim.delta.named_parameters():
            path = claim.place.path if name == "value" else claim.place.path.removesuffix(".in_proj_weight")
            named[path if name == "value" else f"{path}.{name}"] = parameter.grad
    return named


def same_gradients(adapter: veneer.Adapter, model: nn.Module) -> None:
    """Every gradient, each relative to its own size, but for those that are zero in exact arithmetic (a key's bias)."""
    ours, theirs = veneer_gradients(adapter), peft_gradients(model)
    # PEFT's bias="all" trains what is named `bias`, which in_proj_bias is not; it reads its trained value all the same
    assert {key for key in ours if not key.endswith(".in_proj_bias")} == theirs.keys()
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in theirs.values())
    for key, gradient in theirs.items():
        assert gradient.abs().max() > 0, key
        close(ours[key], gradient, key, floor)


def same_everywhere(case: Case, ours: nn.Module, adapter: veneer.Adapter, theirs: nn.Module, base: nn.Module) -> None:
    with torch.no_grad():
        plain = case.answer(base)
    expected = backward(case, theirs)
    assert (expected - plain).abs().max() > 1e-3, "the adapter changes nothing"
    close(backward(case, ours), expected)
    same_gradients(adapter, theirs)


def peft_model(case: Case, base: nn.Module) -> peft.PeftModel:
    """PEFT's adapter on a copy of `base`, with values that are not its start."""
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(base), case.config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".original_module." not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def from_veneer(case: Case, base: nn.Module, folder) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
cases = pytest.mark.parametrize("name", CASES)


@dtypes
@cases
def test_veneer_reads_what_peft_wrote(name, dtype, tmp_path):
    case = CASES[name]
    base = case.base(dtype)
    theirs = peft_model(case, base)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    adapter = veneer.load(ours, tmp_path)
    same_everywhere(case, ours, adapter, theirs, base)


@dtypes
@cases
def test_peft_reads_what_veneer_wrote(name, dtype, tmp_path):
    case = CASES[name]
    base = case.base(dtype)
    ours = copy.deepcopy(base)
    adapter = case.attach(ours)
    perturb(adapter, 0.1)
    veneer.save(adapter, tmp_path)
    theirs = from_veneer(case, base, tmp_path)
    same_everywhere(case, ours, adapter, theirs, base)


@cases
def test_both_write_the_same_tensors(name, tmp_path):
    """PEFT saves, Veneer loads and saves: the tensors that PEFT reads are bit for bit the first ones."""
    from safetensors.torch import load_file

    case = CASES[name]
    base = case.base(torch.float64)
    theirs = peft_model(case, base)
    theirs.save_pretrained(tmp_path / "peft")
    veneer.save(veneer.load(copy.deepcopy(base), tmp_path / "peft"), tmp_path / "veneer")
    again = from_veneer(case, base, tmp_path / "veneer")
    first = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    second = load_file(tmp_path / "veneer" / "adapter_model.safetensors")
    assert second.keys() <= first.keys()
    assert all(".modules_to_save." in key or ".original_module." in key for key in first.keys() - second.keys())
    assert all(torch.equal(second[key], first[key]) for key in second)
    with torch.no_grad():
        assert torch.equal(case.answer(again), case.answer(theirs))


def test_halves_of_an_attention_with_other_ranks_are_no_peft_file(tmp_path):
    """PEFT gives in_proj_weight and out_proj one rank, so Veneer's own file has to hold this."""
    case = Case("layers", {}, {"rank": 4, "rank_pattern": {"out_proj": 2}}, "attn")
    ours = case.base(torch.float64)
    adapter = case.attach(ours)
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["veneer.json", "veneer.safetensors"]
    other = case.base(torch.float64)
    veneer.load(other, tmp_path)
    assert torch.equal(case.answer(other), case.answer(ours))


def test_an_attention_is_one_target(tmp_path):
    """PEFT wraps out_proj with its attention; naming out_proj too would put a second, idle LoRA on it."""
    case = CASES["layers-attention"]
    adapter = case.attach(case.base(torch.float64))
    veneer.save(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["attn"]
    trained = from_veneer(case, case.base(torch.float64), tmp_path).get_nb_trainable_parameters()[0]
    assert trained == sum(parameter.numel() for parameter in adapter.parameters())


@dtypes
def test_embedding_of_a_language_model(dtype, tmp_path):
    """PEFT can save an embedding's base weight beside its LoRA; left out, the files hold the LoRA alone."""
    case = Case("llama", {"target_modules": ["embed_tokens", "q_proj"], **SIZE[0]}, SIZE[1], "embedding | attention.q")
    base = case.base(dtype)
    theirs = peft_model(case, base)
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ours = copy.deepcopy(base)
    adapter = veneer.load(ours, tmp_path / "peft")
    same_everywhere(case, ours, adapter, theirs, base)
    veneer.save(adapter, tmp_path / "veneer")
    with torch.no_grad():
        assert torch.equal(case.answer(from_veneer(case, base, tmp_path / "veneer")), case.answer(theirs))


@dtypes
def test_roles_of_a_fused_projection(dtype, tmp_path):
    """Two roles of GPT-2's c_attn become PEFT's one pair: the same logits, and each role's gradients in its place."""
    case = Case("gpt2", {}, {"rank": 3, "alpha": 6.0}, "attention.q | attention.v")
    base = case.base(dtype)
    ours = copy.deepcopy(base)
    adapter = case.attach(ours)
    perturb(adapter, 0.1)
    assert len(adapter.claims) == 4
    veneer.save(adapter, tmp_path)
    theirs = from_veneer(case, base, tmp_path)
    expected = backward(case, theirs)
    assert (expected - case.answer(base)).abs().max() > 1e-3
    close(backward(case, ours), expected)
    gradients, start = peft_gradients(theirs), {}
    assert len(gradients) == 4
    for claim in adapter.claims:
        first = start.setdefault(claim.place.owner_path, 0)
        columns = slice(first, first + 3)
        start[claim.place.owner_path] += 3
        ((low, high),) = claim.place.spans
        close(claim.delta.A.grad, gradients[f"{claim.place.owner_path}.A"][columns], claim.place.path)
        close(claim.delta.B.grad, gradients[f"{claim.place.owner_path}.B"][low:high, columns], claim.place.path)


def test_dropout_drops_the_same_numbers(tmp_path):
    """The field survives both ways, and the same activations dropped give the same in both."""
    case = Case("llama", {"target_modules": SEVEN, "lora_dropout": 0.4}, {"dropout": 0.4}, "linear")
    base = case.base(torch.float64)
    theirs = peft_model(case, base)
    theirs.save_pretrained(tmp_path / "peft")
    ours = copy.deepcopy(base)
    adapter = veneer.load(ours, tmp_path / "peft")
    assert {claim.method.dropout for claim in adapter.claims} == {0.4}
    veneer.save(adapter, tmp_path / "veneer")
    assert json.loads((tmp_path / "veneer" / "adapter_config.json").read_text())["lora_dropout"] == 0.4
    again = from_veneer(case, base, tmp_path / "veneer")
    still = case.answer(ours).detach()
    answers = []
    same_dropout(theirs)
    same_dropout(again)
    for model in (ours, theirs, again):
        model.train()
        torch.manual_seed(11)
        answers.append(backward(case, model))
    assert (answers[0] - still).abs().max() > 1e-3, "nothing was dropped"
    close(answers[0], answers[1])
    close(answers[0], answers[2])
    same_gradients(adapter, theirs)
