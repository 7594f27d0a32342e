"""DoRA, IA3, VeRA, OFT and LayerNorm tuning compute what Hugging Face PEFT's do, and either reads the other's files."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dropping import same_dropout
from tiny import FAMILIES, logits, perturb
from torch import Tensor, nn

import veneer

with warnings.catch_warnings():
    # peft imports every quantizer it finds, and some of those warn at import that they lack a kernel or a compiler
    warnings.simplefilter("ignore")
    import peft

# peft asks transformers' models for a property that transformers has renamed, and says what it sets for Conv1D
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (load|save) vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative to the largest entry of a tensor."""


@dataclass(frozen=True)
class Case:
    """The same adapter in both libraries' words."""

    family: str
    config: peft.PeftConfig
    method: veneer.Method
    where: str | None
    also_train: tuple[str, ...] = ()

    def base(self, dtype: torch.dtype) -> nn.Module:
        model = FAMILIES[self.family].model().to(dtype)
        if self.family == "bert" and isinstance(self.method, veneer.TrainableTokens):
            # PEFT's forward of a tied head leaves its bias out (seen in 0.21.2)
            nn.init.zeros_(model.get_output_embeddings().bias)
        return model

    def answer(self, model: nn.Module) -> Tensor:
        return logits(model, FAMILIES[self.family].batch())

    def attach(self, model: nn.Module) -> veneer.Adapter:
        return veneer.attach(model, self.method, self.where, also_train=self.also_train)


def quiet(config: type[peft.PeftConfig], **options: Any) -> peft.PeftConfig:
    """A config that warns when it is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config(**options)


FAN = {"fan_in_fan_out": True}
LORA = {"r": 4, "lora_alpha": 12, "use_dora": True}
DORA = {"rank": 4, "alpha": 12.0}
CASES = {
    "dora-llama": Case(
        "llama",
        peft.LoraConfig(target_modules=["q_proj", "k_proj", "down_proj"], **LORA),
        veneer.DoRA(**DORA),
        "attention.q | attention.k | mlp.down",
    ),
    "dora-gpt2": Case(
        "gpt2",
        peft.LoraConfig(target_modules=["c_attn", "c_proj"], **LORA, **FAN),
        veneer.DoRA(**DORA),
        "c_attn | c_proj",
    ),
    "dora-bert-all": Case(
        "bert",
        peft.LoraConfig(target_modules=["query", "value"], bias="all", **LORA),
        veneer.DoRA(**DORA, bias="all"),
        "query | value",
    ),
    "dora-vit": Case(
        "vit",
        peft.LoraConfig(target_modules=["projection", "q_proj"], modules_to_save=["classifier"], **LORA),
        veneer.DoRA(**DORA),
        "projection | q_proj",
        ("classifier",),
    ),
    "ia3-llama": Case(
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        veneer.IA3(),
        None,
    ),
    "ia3-gpt2": Case(
        "gpt2",
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], **FAN),
        veneer.IA3(feedforward="mlp.c_proj"),
        "c_attn",
    ),
    "ia3-bert": Case(
        "bert",
        peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        veneer.IA3(feedforward="output.dense"),
        "key | value",
    ),
    "ia3-vit": Case(
        "vit",
        peft.IA3Config(
            target_modules=["projection", "fc2"], feedforward_modules=["fc2"], modules_to_save=["classifier"]
        ),
        veneer.IA3(),
        "projection",
        ("classifier",),
    ),
    "vera-llama": Case(
        "llama",
        peft.VeraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"]),
        veneer.VeRA(rank=6),
        "q_proj | v_proj | down_proj",
    ),
    "vera-gpt2": Case(
        "gpt2", peft.VeraConfig(r=6, target_modules=["c_attn", "c_fc"], **FAN), veneer.VeRA(rank=6), "c_attn | c_fc"
    ),
    "vera-bert-seed": Case(
        "bert",
        quiet(peft.VeraConfig, r=6, target_modules=["query", "value"], projection_prng_key=5, save_projection=False),
        veneer.VeRA(rank=6, seed=5, save_projection=False),
        "query | value",
    ),
    "oft-llama": Case(
        "llama",
        peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]),
        veneer.OFT(block_size=8, num_cayley_neumann_terms=5),
        "q_proj | down_proj",
    ),
    "oft-llama-exact": Case(
        "llama",
        peft.OFTConfig(oft_block_size=16, target_modules=["q_proj", "v_proj"], use_cayley_neumann=False),
        veneer.OFT(block_size=16),
        "q_proj | v_proj",
    ),
    "oft-bert-share": Case(
        "bert",
        peft.OFTConfig(
            oft_block_size=8, target_modules=["query", "value"], block_share=True, num_cayley_neumann_terms=4
        ),
        veneer.OFT(block_size=8, block_share=True, num_cayley_neumann_terms=4),
        "query | value",
    ),
    "ln-llama": Case(
        "llama", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]), veneer.LayerNormTuning(),
        "input_layernorm | norm",
    ),
    "ln-gpt2": Case(
        "gpt2", peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]), veneer.LayerNormTuning(), None
    ),
    "tokens-llama": Case(
        "llama",
        peft.TrainableTokensConfig(token_indices=[9, 33, 5], target_modules=["embed_tokens"]),
        veneer.TrainableTokens([9, 33, 5]),
        None,
    ),
    "tokens-gpt2-tied": Case(
        "gpt2",
        peft.TrainableTokensConfig(token_indices=[9, 33, 5], target_modules=["wte"]),
        veneer.TrainableTokens([9, 33, 5]),
        None,
    ),
    "tokens-bert-tied": Case(
        "bert",
        peft.TrainableTokensConfig(token_indices=[9, 33, 5], target_modules=["word_embeddings"]),
        veneer.TrainableTokens([9, 33, 5]),
        None,
    ),
    "ln-bert": Case("bert", peft.LNTuningConfig(target_modules=["LayerNorm"]), veneer.LayerNormTuning(), None),
}  # fmt: skip


def close(actual: Tensor, expected: Tensor, what: str = "output", floor: float = 0.0) -> None:
    assert actual.dtype == expected.dtype, what
    error = (actual.reshape(expected.shape) - expected).abs().max().item()
    assert error <= TOLERANCE[expected.dtype] * max(expected.abs().max().item(), floor), f"{what} differs by {error}"


def backward(case: Case, model: nn.Module) -> Tensor:
    answer = case.answer(model)
    answer.pow(2).mean().backward()
    return answer.detach()


def same_gradients(adapter: veneer.Adapter, model: nn.Module) -> None:
    """Every gradient, of the tensors in the order of the model; PEFT's names differ from kind to kind."""
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours = [(key, p.grad) for key, p in adapter.named_parameters()]
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in theirs.values())
    assert len(ours) == len(theirs)
    for key, mine in ours:
        path, _, name = key.rpartition(".")
        path = path.rpartition(".")[0].removesuffix(".weight").removesuffix(".bias")
        alike = [
            other
            for n, other in theirs.items()
            if n.removeprefix("base_model.model.").startswith(f"{path}.") and other.numel() == mine.numel()
        ]
        assert any(_is_close(mine, other, floor) for other in alike), (key, name, [a.shape for a in alike])


def _is_close(mine: Tensor, other: Tensor, floor: float) -> bool:
    error = (mine.reshape(other.shape) - other).abs().max().item()
    return error <= TOLERANCE[other.dtype] * max(other.abs().max().item(), floor)


def same_everywhere(case: Case, ours: nn.Module, adapter: veneer.Adapter, theirs: nn.Module, base: nn.Module) -> None:
    with torch.no_grad():
        plain = case.answer(base)
    expected = backward(case, theirs)
    assert (expected - plain).abs().max() > 1e-4, "the adapter changes nothing"
    close(backward(case, ours), expected)
    same_gradients(adapter, theirs)


def peft_model(case: Case, base: nn.Module) -> peft.PeftModel:
    """PEFT's adapter on a copy of `base`, with values that are not its start."""
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(case.config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".original_module." not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def from_veneer(base: nn.Module, folder) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
cases = pytest.mark.parametrize("name", CASES)


@dtypes
@cases
def test_veneer_reads_what_peft_wrote(name, dtype, tmp_path):
    case = CASES[name]
    base = case.base(dtype)
    theirs = peft_model(case, base)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
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
    theirs = from_veneer(base, tmp_path)
    same_everywhere(case, ours, adapter, theirs, base)


@cases
def test_both_write_the_same_tensors(name, tmp_path):
    """PEFT saves, Veneer loads and saves: the tensors are bit for bit the first ones."""
    from safetensors.torch import load_file

    case = CASES[name]
    base = case.base(torch.float64)
    peft_model(case, base).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    veneer.save(veneer.load(copy.deepcopy(base), tmp_path / "peft"), tmp_path / "veneer")
    first = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    second = load_file(tmp_path / "veneer" / "adapter_model.safetensors")
    assert second.keys() <= first.keys()
    assert all(".modules_to_save." in key or ".original_module." in key for key in first.keys() - second.keys())
    assert all(torch.equal(second[key], first[key]) for key in second)


def test_scales_of_a_fused_projection_are_one_tensor(tmp_path):
    """IA3 on two roles of GPT-2's c_attn: PEFT's one vector, with ones for the third role."""
    case = CASES["ia3-gpt2"]
    base = case.base(torch.float64)
    ours = copy.deepcopy(base)
    adapter = veneer.attach(ours, veneer.IA3())
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "IA3"
    with torch.no_grad():
        close(case.answer(from_veneer(base, tmp_path)), case.answer(ours))


def test_three_terms_are_peft_s_four(tmp_path):
    """PEFT sums I + 2Q + 2Q² + Q³ for three terms as for four."""
    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], num_cayley_neumann_terms=3)
    case = Case("llama", config, veneer.OFT(block_size=8), "q_proj")
    base = case.base(torch.float64)
    theirs = peft_model(case, base)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    same_everywhere(case, ours, veneer.load(ours, tmp_path), theirs, base)


def test_dora_drops_the_same_numbers(tmp_path):
    """With dropout the base's part sees the dropped inputs too, as in PEFT."""
    case = Case(
        "llama",
        peft.LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.4, **LORA),
        veneer.DoRA(**DORA, dropout=0.4),
        "q_proj | up_proj",
    )
    base = case.base(torch.float64)
    theirs = peft_model(case, base)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    adapter = veneer.load(ours, tmp_path)
    still = case.answer(ours).detach()
    answers = []
    same_dropout(theirs)
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(11)
        answers.append(backward(case, model))
    assert (answers[0] - still).abs().max() > 1e-3, "nothing was dropped"
    close(answers[0], answers[1])
    same_gradients(adapter, theirs)
