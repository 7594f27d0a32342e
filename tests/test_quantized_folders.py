"""A base in four bits while loading: the same bytes as in place, one dense tensor at a time, and folders both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, TOKENS, logits, perturb
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

import veneer
from veneer.errors import AdapterError, CorruptFile, FileError, NoSuchPlace, PlaceError, WrongModel
from veneer.formats.nf4 import NF4Linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes says at import which kernels it does without on a CPU
    import bitsandbytes as bnb

PACKED = sorted(set(FAMILIES) - {"gpt2"})  # whose linears are no nn.Linear


def dense(folder: Path, family: str = "llama", **options) -> nn.Module:
    model = FAMILIES[family].model().bfloat16()
    model.save_pretrained(folder, **options)
    return model


def same(one: nn.Module, other: nn.Module) -> None:
    mine, its = one.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == its[key].dtype, key
        assert torch.equal(tensor, its[key]), key


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder's one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", PACKED)
def test_loading_gives_the_bytes_of_quantizing_in_place(family, tmp_path):
    kind = type(dense(tmp_path / "dense", family))
    model = kind.from_pretrained(tmp_path / "dense", dtype="auto")
    loaded = veneer.load_quantized(tmp_path / "dense")
    assert type(loaded) is kind
    same(veneer.quantize(model, veneer.NF4()), loaded)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    with torch.no_grad():
        batch = FAMILIES[family].batch()
        batch = {name: t.bfloat16() if t.is_floating_point() else t for name, t in batch.items()}
        assert torch.equal(loaded(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("family", PACKED)
def test_folders_go_both_ways_with_transformers(family, tmp_path):
    """Saved, then read by transformers with bitsandbytes, and by Veneer: the same bytes each time; no experts yet."""
    model = veneer.quantize(dense(tmp_path / "dense", family), veneer.NF4(block_size=128), where="linear")
    assert veneer.save_quantized(model, tmp_path / "packed") == tmp_path / "packed"
    theirs = type(model).from_pretrained(tmp_path / "packed", dtype="auto")
    paths = {path for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert {path for path, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)} == paths
    same(model, theirs)
    same(model, veneer.load_quantized(tmp_path / "packed"))


@pytest.mark.parametrize("double", [False, True])
def test_what_transformers_quantized_opens_as_it_is(double, tmp_path):
    dense(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype="auto", device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed")
    ours = veneer.load_quantized(tmp_path / "packed")
    same(theirs, ours)
    assert sum(isinstance(module, NF4Linear) for module in ours.modules()) == 14
    ours.save_pretrained(tmp_path / "again")
    same(ours, veneer.load_quantized(tmp_path / "again"))


@pytest.mark.parametrize("theirs", [False, True])
def test_a_partly_merged_base_saves_as_what_it_is(theirs, tmp_path):
    dense(tmp_path / "dense")
    if theirs:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": config, "dtype": "auto", "device_map": "cpu"}
        model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", **options)
    else:
        model = veneer.load_quantized(tmp_path / "dense")
    before = model.config.to_dict()["quantization_config"]["llm_int8_skip_modules"]
    adapter = veneer.attach(model, veneer.LoRA(rank=4), where="attention.q")
    perturb(adapter, 0.1)
    veneer.merge(model, adapter)
    veneer.unmerge(model, adapter)
    assert set(model.config.to_dict()["quantization_config"]["llm_int8_skip_modules"]) == {*(before or ()), "lm_head"}
    veneer.merge(model, adapter, permanent=True)
    model.save_pretrained(tmp_path / "merged")
    for loaded in (veneer.load_quantized(tmp_path / "merged"), LlamaForCausalLM.from_pretrained(tmp_path / "merged")):
        assert type(loaded.model.layers[0].self_attn.q_proj) is nn.Linear
        assert type(loaded.model.layers[0].self_attn.k_proj) is not nn.Linear
        same(model, loaded)


def test_a_sharded_folder_and_other_options(tmp_path):
    model = dense(tmp_path / "dense", max_shard_size="5KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    options = {"where": "attention", "skip": ["o_proj", "re:.*layers\\.0.*"]}
    loaded = veneer.load_quantized(str(tmp_path / "dense"), veneer.NF4(32, double_quant=False), **options)
    same(veneer.quantize(model, veneer.NF4(32, double_quant=False), **options), loaded)
    assert sum(isinstance(module, NF4Linear) for module in loaded.modules()) == 3
    with pytest.raises(NoSuchPlace, match="no_such"):
        veneer.load_quantized(tmp_path / "dense", skip=["no_such"])


def test_weights_that_are_one_in_the_file_and_two_in_the_model(tmp_path):
    """The dense file is cut while loading; the packed one has the keys of the model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **sizes)).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    assert any("weights_in" in key for key in load_file(tmp_path / "dense" / "model.safetensors"))
    loaded = veneer.load_quantized(tmp_path / "dense")
    same(veneer.quantize(model, veneer.NF4()), loaded)
    assert type(loaded.encoder.layer[0].mlp.up_proj) is NF4Linear
    veneer.save_quantized(loaded, tmp_path / "packed")
    same(loaded, veneer.load_quantized(tmp_path / "packed"))
    same(loaded, Dinov2Model.from_pretrained(tmp_path / "packed", dtype="auto"))


def test_dtypes_are_those_of_the_config_or_as_asked(tmp_path):
    model = dense(tmp_path / "dense").float()
    as_stored = veneer.load_quantized(tmp_path / "dense")
    assert {p.dtype for p in as_stored.parameters()} == {torch.bfloat16, torch.uint8}
    as_asked = veneer.load_quantized(tmp_path / "dense", dtype=torch.float32)
    assert {p.dtype for p in as_asked.parameters()} == {torch.float32, torch.uint8}
    same(veneer.quantize(model, veneer.NF4()), as_asked)
    veneer.save_quantized(as_stored, tmp_path / "packed")
    again = veneer.load_quantized(tmp_path / "packed", dtype=torch.float32)
    assert again.lm_head.weight.dtype == torch.float32
    assert torch.equal(again.model.layers[1].mlp.up_proj.absmax, as_stored.model.layers[1].mlp.up_proj.absmax)


def test_a_new_head_may_be_missing_but_no_quantized_weight(tmp_path):
    dense(tmp_path / "dense")
    model = veneer.load_quantized(tmp_path / "dense", model_class=AutoModelForSequenceClassification)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.score.weight.isfinite().all()
    rewrite(tmp_path / "dense", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CorruptFile, match=r"dense: .* no model\.layers\.1\.mlp\.up_proj\.weight"):
        veneer.load_quantized(tmp_path / "dense")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad, tmp_path):
    dense(tmp_path / "dense")
    rewrite(tmp_path / "dense", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7:8].fill_(bad))
    with pytest.raises(PlaceError, match=r"model\.layers\.1\.mlp\.up_proj has weights that are not finite"):
        veneer.load_quantized(tmp_path / "dense")


def test_a_weight_of_another_shape_is_refused_by_name(tmp_path):
    dense(tmp_path / "dense")
    rewrite(tmp_path / "dense", lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(7, 5)}))
    with pytest.raises(WrongModel, match=r"layers\.0\.mlp\.up_proj\.weight is \[7, 5\] in the checkpoint, not"):
        veneer.load_quantized(tmp_path / "dense")


def test_odd_sizes_partial_blocks_zeros_and_biases(tmp_path):
    """Sizes that no block divides, an odd number of weights, a block of zeros; biases keep their dtype."""
    sizes = {"hidden_size": 36, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=11, num_key_value_heads=1, head_dim=9 - 1, attention_bias=True, **sizes, **TOKENS)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).half()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[64:128] = 0
        model.model.layers[0].self_attn.q_proj.bias.normal_()
    model.save_pretrained(tmp_path / "dense")
    loaded = veneer.load_quantized(tmp_path / "dense")
    same(veneer.quantize(model, veneer.NF4()), loaded)
    layer = loaded.model.layers[0]
    assert layer.self_attn.q_proj.bias.dtype == torch.float16
    assert layer.mlp.up_proj.dense().view(-1)[64:128].abs().max() == 0
    veneer.save_quantized(loaded, tmp_path / "packed")
    same(loaded, veneer.load_quantized(tmp_path / "packed"))


def lose(key):
    return lambda tensors: tensors.pop(f"model.layers.1.mlp.up_proj.{key}")


def state(**changes):
    def change(tensors):
        key = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
        content = json.loads(bytes(tensors[key].tolist())) | changes
        tensors[key] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return change


def put(key, tensor):
    return lambda tensors: tensors.update({f"model.layers.1.mlp.up_proj.{key}": tensor})


DAMAGES = {
    "no magnitudes": (lose("weight.absmax"), r"up_proj\.weight\.absmax is missing"),
    "no state": (lose("weight.quant_state.bitsandbytes__nf4"), r"bitsandbytes__nf4 is missing"),
    "no bytes": (lose("weight"), r"up_proj\.weight is missing"),
    "no second level": (lose("weight.nested_absmax"), r"nested_absmax has 0 numbers, not the 1"),
    "another kind": (state(quant_type="fp4"), "is fp4"),
    "another dtype": (state(dtype="int8"), "of int8, which NF4 is not made from"),
    "another block size": (state(blocksize=128), r"absmax has 24 numbers, not the 12 that a weight of \[48, 32\]"),
    "another shape": (state(shape=[32, 48]), r"up_proj\.weight is \[32, 48\] in the checkpoint, not \[48, 32\]"),
    "no JSON": (
        put("weight.quant_state.bitsandbytes__nf4", torch.tensor([1, 2], dtype=torch.uint8)),
        r"up_proj\.weight\.quant_state is not readable",
    ),
    "fewer bytes": (put("weight", torch.zeros(3, 1, dtype=torch.uint8)), r"weight has 3 numbers, not the 768"),
    "other levels": (put("weight.quant_map", torch.linspace(-1, 1, 16)), r"quant_map has other levels than NF4"),
    "no number": (put("weight.nested_absmax", torch.tensor([float("nan")])), "magnitudes that are not finite"),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = veneer.quantize(dense(folder / "dense"), veneer.NF4())
    return load_file(veneer.save_quantized(model, folder / "packed") / "model.safetensors"), folder / "packed"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_by_name(damage, packed, tmp_path):
    tensors, folder = dict(packed[0]), packed[1]
    change, message = DAMAGES[damage]
    change(tensors)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError, match=message):
        veneer.load_quantized(tmp_path)


def test_a_lost_linear_is_not_drawn_at_random(packed, tmp_path):
    tensors = {key: tensor for key, tensor in packed[0].items() if "1.mlp.up_proj" not in key}
    (tmp_path / "config.json").write_bytes((packed[1] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        veneer.load_quantized(tmp_path)


def test_what_cannot_be_loaded_or_saved_is_refused(packed, tmp_path):
    with pytest.raises(FileError, match="holds no transformers model"):
        veneer.load_quantized(tmp_path)
    with pytest.raises(FileError, match="in NF4 already"):
        veneer.load_quantized(packed[1], veneer.NF4())
    config = json.loads((packed[1] / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"quantized already \(fp4\)"):
        veneer.load_quantized(tmp_path)
    model = veneer.load_quantized(packed[1])
    with pytest.raises(FileError, match="exists already"):
        veneer.save_quantized(model, tmp_path)
    adapter = veneer.attach(model, veneer.LoRA(rank=2))
    with pytest.raises(AdapterError, match="carries adapters"):
        veneer.save_quantized(model, tmp_path / "new")
    veneer.detach(model, adapter)
    with pytest.raises(PlaceError, match="nothing in NF4"):
        veneer.save_quantized(FAMILIES["llama"].model(), tmp_path / "new")
    with pytest.raises(FileError, match="no transformers model"):
        veneer.save_quantized(nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_without_dense_linears_is_refused():
    with pytest.raises(PlaceError, match="names no dense linear of GPT2LMHeadModel"):
        veneer.quantize(FAMILIES["gpt2"].model(), veneer.NF4())


def test_a_save_that_fails_leaves_nothing(packed, tmp_path, monkeypatch):
    model = veneer.load_quantized(packed[1])
    monkeypatch.setattr(type(model), "save_pretrained", lambda *args, **options: (tmp_path / "no" / "folder").touch())
    with pytest.raises(FileNotFoundError):
        veneer.save_quantized(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_size_on_disk(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes, **TOKENS)).bfloat16()
    weights = sum(linear.weight.numel() for linear in model.model.layers.modules() if isinstance(linear, nn.Linear))
    before = sum(p.numel() for p in model.parameters())
    folder = veneer.save_quantized(veneer.quantize(model, veneer.NF4()), tmp_path / "packed")
    bits = sum(8 * t.numel() * t.element_size() for key, t in load_file(folder / "model.safetensors").items()
               if key.endswith(("proj.weight", "proj.weight.absmax", "proj.weight.nested_absmax")))  # fmt: skip
    assert round(bits / weights, 3) == 4.127
    held = [m.packed for m in model.modules() if isinstance(m, NF4Linear)]
    stored = [t for p in held for t in (p.data, p.absmax, p.outer, p.offset)]
    assert round(8 * sum(t.numel() * t.element_size() for t in stored) / weights, 3) == 4.127
    assert veneer.count_parameters(model).total == before


def test_magnitudes_keep_their_dtype_when_a_model_is_cast(packed):
    model = veneer.load_quantized(packed[1])
    before = {path: m.dense(torch.float32) for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    model.to(torch.float16).to("cpu")
    assert model.lm_head.weight.dtype == torch.float16
    for path, weight in before.items():
        assert torch.equal(model.get_submodule(path).dense(torch.float32), weight), path


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_adapters_on_a_loaded_base_in_float32_or_as_asked(dtype, packed):
    model, batch = veneer.load_quantized(packed[1]), FAMILIES["llama"].batch()
    adapter = veneer.attach(model, veneer.LoRA(rank=2), dtype=dtype)
    assert {p.dtype for p in adapter.parameters()} == {dtype or torch.float32}
    perturb(adapter)
    logits(model, batch).pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_trainer_takes_a_loaded_base(packed, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = veneer.load_quantized(packed[1], dtype=torch.float32)
    adapter = veneer.attach(model, veneer.LoRA(rank=2))
    before = [p.detach().clone() for p in adapter.parameters()]
    rows = [{"input_ids": ids, "labels": ids} for ids in FAMILIES["llama"].batch()["input_ids"]]
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows).train()
    assert any(not torch.equal(p, old) for p, old in zip(adapter.parameters(), before, strict=True))


PEAK = """
import sys, torch, veneer
from pathlib import Path

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

veneer.load_quantized(sys.argv[2])  # what the libraries take, imports included
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = resident("VmRSS")
model = veneer.load_quantized(sys.argv[1])
peak = resident("VmHWM") - before
held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(peak, held)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_the_peak_is_the_packed_model_and_its_largest_tensor(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **TOKENS)).bfloat16()
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    dense(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, tmp_path / "large", tmp_path / "small"],
        capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back at once and counts no more
    )  # fmt: skip
    peak, held = map(int, done.stdout.split())
    slack = 48 * 2**20  # what quantizing a piece of a weight takes
    assert held < 0.3 * whole
    assert peak < held + largest + slack, (peak, held, largest)
    assert held + largest + slack < whole // 2


def test_a_hub_id_and_revision_are_transformers_to_resolve(monkeypatch, tmp_path):
    """What is asked of `from_pretrained`; nothing is fetched."""
    dense(tmp_path / "dense")
    asked = []
    original = LlamaForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, source, **options):
        asked.append((source, options["revision"]))
        return original(cls, tmp_path / "dense", **options)

    config = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda source, revision: config)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    veneer.load_quantized("someone/model", revision="v2")
    assert asked == [("someone/model", "v2")]


def test_commands(tmp_path):
    """`quantize` writes the folder, `inspect` says how many bits it takes, mistakes are one sentence."""
    command = [sys.executable, "-W", "ignore", "-m", "veneer"]

    def run(*words):
        return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False)

    model = dense(tmp_path / "dense")
    done = run("quantize", tmp_path / "dense", tmp_path / "packed", "--no-double-quant", "--skip", "o_proj", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 4.5 <= found["bits"] < 4.6  # rows of 32 leave half a block at some ends
    veneer.quantize(model, veneer.NF4(double_quant=False), skip=["o_proj"])
    same(model, veneer.load_quantized(tmp_path / "packed"))
    shown = run("inspect", tmp_path / "packed")
    assert f"{found['weights']:,} of them in NF4, {found['bits']:.3f} bits each" in shown.stdout
    for words, message in [
        (("quantize", tmp_path / "dense", tmp_path / "packed"), "exists already"),
        (("quantize", tmp_path / "dense", tmp_path / "new", "--block-size", 48), "choose one of 32, 64"),
        (("quantize", tmp_path / "packed", tmp_path / "new"), "in NF4 already"),
        (("quantize", tmp_path / "none", tmp_path / "new"), "holds no transformers model"),
    ]:
        refused = run(*words)
        assert refused.returncode == 2
        assert refused.stdout == ""
        assert refused.stderr.splitlines()[-1].startswith("veneer: ")
        assert message in refused.stderr
    assert not (tmp_path / "new").exists()
