"""Attacks on the file format: whatever a folder holds, loading it works or names what is wrong and touches nothing."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, IDS, logits, perturb, text
from torch import nn

import veneer
from veneer import errors, files

CONFIG, TENSORS, RECIPE, OWN = "adapter_config.json", "adapter_model.safetensors", "veneer.json", "veneer.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LOST = "model.layers.1.self_attn.v_proj"


def snapshot(model):
    return {
        "keys": list(model.state_dict()),
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "state": "_veneer" in vars(model),
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder that loads, and the model it was saved from."""
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.LoRA(rank=2), "attention.q | attention.v")
    perturb(adapter)
    folder = veneer.save(adapter, tmp_path_factory.mktemp("good") / "adapter")
    return folder, adapter


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good[0], tmp_path / "adapter"))


def refused(folder, kind, *words, model=None, name="default"):
    """Loading raises exactly `kind` (None: any FileError), with these words, and leaves the model as it was."""
    model = model or FAMILIES["llama"].model()
    before = snapshot(model)
    with pytest.raises(kind or errors.FileError) as caught:
        veneer.load(model, folder, name=name)
    assert kind in (None, type(caught.value))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert snapshot(model) == before


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def sign(folder, name=TENSORS):
    """Make the recipe vouch for the tensors that are there now, as an attacker would."""
    edit(folder / RECIPE, lambda r: r["tensors"].update(sha256=files.digest((folder / name).read_bytes())))


def rewrite(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    sign(folder)


def test_the_good_folder_loads(folder, good):
    model = FAMILIES["llama"].model()
    loaded = veneer.load(model, folder)
    for key, tensor in good[1].state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert torch.equal(logits(model, text()), logits(good[1].model, text()))


# Damaged tensors


@pytest.mark.parametrize("plain", [False, True], ids=["veneer", "peft"])
@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_truncated_tensors(folder, length, plain):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:length])
    if plain:
        (folder / RECIPE).unlink()
    refused(folder, errors.CorruptFile, str(folder / TENSORS), "truncated or no safetensors file")


@pytest.mark.parametrize("length", [0, 3, 10**10, 2**64 - 1])
def test_wrong_header_length(folder, length):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(folder, errors.CorruptFile, str(folder / TENSORS), "truncated or no safetensors file")


def test_header_that_claims_ten_gigabytes(folder):
    header = json.dumps({KEY: {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10**10]}}).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 1000)
    refused(folder, errors.CorruptFile, str(folder / TENSORS), "truncated or no safetensors file")


def test_changed_bytes(folder):
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)
    refused(folder, errors.CorruptFile, str(folder / TENSORS), "is not the file that veneer.json describes")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda t: t.pop(KEY), errors.CorruptFile, [KEY, "missing"]),
        (lambda t: t.update(surplus=torch.ones(1)), errors.CorruptFile, ["surplus left over"]),
        (lambda t: t[KEY].view(-1)[3:4].fill_(float("nan")), errors.CorruptFile, [KEY, "NaN"]),
        (lambda t: t[KEY].view(-1)[3:4].fill_(float("-inf")), errors.CorruptFile, [KEY, "infinite"]),
        (lambda t: t.update({KEY: t[KEY][:1].clone()}), errors.WrongModel, [KEY, "(1, 32)", "(2, 32)"]),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), errors.WrongModel, [KEY, "(32, 2)", "(2, 32)"]),
        (lambda t: t.clear(), errors.CorruptFile, ["missing"]),
    ],
    ids=["missing", "extra", "nan", "inf", "shape", "transposed", "empty"],
)
@pytest.mark.parametrize("plain", [False, True], ids=["veneer", "peft"])
def test_wrong_tensors(folder, change, kind, words, plain):
    rewrite(folder, change)
    if plain:
        (folder / RECIPE).unlink()
    if not plain:
        refused(folder, kind, str(folder / TENSORS), *words)
    elif "surplus left over" in words:  # without a recipe a key says where it belongs, and there it cannot go
        refused(folder, errors.WrongModel, str(folder), "surplus")
    else:
        refused(folder, kind, str(folder / (CONFIG if words == ["missing"] else TENSORS)), *words)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int32])
def test_tensors_of_a_dtype_that_cannot_train(folder, dtype):
    rewrite(folder, lambda t: t.update({KEY: t[KEY].to(dtype)}))
    refused(folder, errors.CorruptFile, str(folder / TENSORS), KEY)


def test_wrong_base_model(folder):
    refused(folder, errors.WrongModel, str(folder), "LlamaForCausalLM", model=FAMILIES["gpt2"].model())
    (folder / RECIPE).unlink()
    refused(folder, errors.WrongModel, str(folder), model=FAMILIES["gpt2"].model())


def test_base_model_of_another_width(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    refused(folder, errors.WrongModel, str(folder / TENSORS), KEY, "(2, 32)", "(2, 64)", model=wide)


def test_pickle_is_refused(folder):
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    for name in (RECIPE, ""):
        refused(folder, errors.UnsafeFile, str(folder / "adapter_model.bin"), "pickle", "can run code")
        if name:
            (folder / name).unlink()


@pytest.mark.parametrize("plain", [False, True], ids=["veneer", "peft"])
def test_no_tensors_at_all(folder, plain):
    (folder / TENSORS).unlink()
    if plain:
        (folder / RECIPE).unlink()
    refused(folder, errors.FileError, str(folder / TENSORS), "does not exist")


# Damaged recipes


def option(**options):
    return lambda r: r["claims"][0]["options"].update(options)


def place(**fields):
    return lambda r: r["claims"][0]["places"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda r: r["tensors"].update(file="../../x"), errors.CorruptFile, ["../../x"]),
        (lambda r: r["tensors"].update(file="/etc/passwd"), errors.CorruptFile, ["/etc/passwd"]),
        (lambda r: r["tensors"].pop("sha256"), errors.CorruptFile, ["tensors.sha256"]),
        (lambda r: r.pop("claims"), errors.CorruptFile, ["claims"]),
        (lambda r: r.update(surplus=1), errors.CorruptFile, ["surplus"]),
        (lambda r: r.update(also_train="lm_head"), errors.CorruptFile, ["also_train"]),
        (lambda r: r.update(format=True), errors.CorruptFile, ["format"]),
        (lambda r: r.update(format=2), errors.FileError, ["has format 2", "Install a newer Veneer"]),
        (option(rank="8"), errors.CorruptFile, ["rank", "'8'"]),
        (option(rank=True), errors.CorruptFile, ["rank", "True"]),
        (option(rank=0), errors.CorruptFile, ["rank=0"]),
        (option(alpha="NaN"), errors.CorruptFile, ["alpha"]),
        (option(dropout=[0.1]), errors.CorruptFile, ["dropout"]),
        (option(secret=1), errors.CorruptFile, ["secret"]),
        (lambda r: r["claims"][0].update(options=[]), errors.CorruptFile, ["claims.0.options"]),
        (lambda r: r["claims"][0].update(method="LoRa"), errors.FileError, ["'LoRa'", "Closest: LoRA", "newer"]),
        (lambda r: r["claims"][0].update(method="__all__"), errors.FileError, ["'__all__'"]),
        (lambda r: r["claims"][0].update(method="Rank"), errors.FileError, ["'Rank'"]),
        (place(path="model.layers.0.self_attn.q_prj"), errors.WrongModel, ["q_prj", "q_proj"]),
        (place(tied=["nowhere.weight"]), errors.WrongModel, ["nowhere.weight"]),
        (place(spans=[[0]]), errors.CorruptFile, ["spans"]),
    ],
    ids=lambda value: None if callable(value) or isinstance(value, type) else "-".join(value).replace("/", "!"),
)
def test_wrong_recipe(folder, change, kind, words):
    edit(folder / RECIPE, change)
    refused(folder, kind, RECIPE if kind is not errors.WrongModel else str(folder), *words)


@pytest.mark.parametrize(
    "spans", [[[0, 1000]], [[-4, 2]], [[8, 2]], [[0, 0]], [[0, 4], [2, 8]]], ids=lambda s: str(s).replace(" ", "")
)
def test_spans_that_the_weight_does_not_have(folder, spans):
    edit(folder / RECIPE, place(spans=spans))
    model = FAMILIES["llama"].model()
    before = snapshot(model)
    with pytest.raises(errors.FileError, match="q_proj"):
        veneer.load(model, folder)
    assert snapshot(model) == before


def test_a_rank_for_which_no_memory_is_there(folder):
    edit(folder / RECIPE, option(rank=10**13))
    model = FAMILIES["llama"].model()
    before = snapshot(model)
    with pytest.raises(errors.FileError):
        veneer.load(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(claims=[]),
        lambda r: r["claims"][0].update(places=[]),
        lambda r: r["claims"][0].update(
            method="FullFineTuning", options={}, places=[{"path": "lm_head.weight", "spans": None, "tied": []}]
        ),
        option(alpha=float("nan")),
        option(alpha=float("inf")),
    ],
    ids=["no claims", "no places", "other method", "alpha nan", "alpha inf"],
)
def test_recipe_that_means_no_adapter(folder, change):
    edit(folder / RECIPE, change)
    model = FAMILIES["llama"].model()
    before = snapshot(model)
    with pytest.raises(errors.FileError):
        veneer.load(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", [RECIPE, CONFIG])
@pytest.mark.parametrize(
    "content",
    [
        b"[1, 2]",
        b'"text"',
        b"{",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"peft_type": "\\ud800", "veneer": "\\ud800"}',
    ],
    ids=["list", "string", "half", "empty", "binary", "deep", "huge number", "surrogate"],
)
def test_json_that_is_none(folder, name, content):
    if name == CONFIG:
        (folder / RECIPE).unlink()
    (folder / name).write_bytes(content)
    refused(folder, None, str(folder / name))


@pytest.mark.parametrize("name", [RECIPE, CONFIG, TENSORS])
def test_folder_where_a_file_belongs(folder, name):
    if name == CONFIG:
        (folder / RECIPE).unlink()
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, None, str(folder / name))


# Folders that are no adapter, names that are no name


def test_folder_without_adapter(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, errors.FileError, str(tmp_path), "holds no adapter", RECIPE, CONFIG)


def test_file_instead_of_folder(folder):
    refused(folder / TENSORS, errors.FileError, str(folder / TENSORS), "is no folder")
    adapter = veneer.attach(FAMILIES["llama"].model(), veneer.LoRA(rank=2))
    before = (folder / TENSORS).read_bytes()
    with pytest.raises(errors.FileError, match="is a file; save an adapter into a folder"):
        veneer.save(adapter, folder / TENSORS)
    assert (folder / TENSORS).read_bytes() == before


def test_nothing_there_and_no_hub_id(tmp_path):
    for absent in (tmp_path / "absent", "absent", "a/b/c"):
        refused(absent, errors.FileError, str(absent), "no folder and no Hub id")


def test_local_folder_has_no_revision(folder):
    with pytest.raises(errors.FileError, match="has no revision 'main'"):
        veneer.load(FAMILIES["llama"].model(), folder, revision="main")


@pytest.mark.parametrize(
    "name",
    ["../../x", "a/b", "a.b", "", " ", "1st", "keys", "forward", "bindings", "path", "routes", "training", "a b"],
)
def test_names_that_no_adapter_can_have(folder, name):
    refused(folder, errors.PlaceError, f"'{name}'", name=name)


def test_name_that_is_taken(folder):
    model = FAMILIES["llama"].model()
    veneer.load(model, folder, name="one")
    refused(folder, errors.PlaceError, "already has an adapter 'one'", model=model, name="one")


# Other people's folders


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda c: c.update(use_qalora=True), errors.FileError, ["use_qalora"]),
        (lambda c: c.update(init_lora_weights="pissa"), errors.FileError, ["init_lora_weights='pissa'"]),
        (lambda c: c.update(init_lora_weights="pissa_niter_16"), errors.FileError, ["pissa_niter_16"]),
        (lambda c: c.update(init_lora_weights="loftq"), errors.FileError, ["loftq"]),
        (lambda c: c.update(peft_type="POLY"), errors.FileError, ["'POLY'"]),
        (lambda c: c.pop("peft_type"), errors.FileError, ["None"]),
        (lambda c: c.update(layer_replication=[[0, 2]]), errors.FileError, ["layer_replication"]),
        (lambda c: c.update(trainable_token_indices=[3]), errors.FileError, ["trainable_token_indices"]),
        (lambda c: c.update(r="2"), errors.CorruptFile, ["rank", "'2'"]),
        (lambda c: c.update(r=True), errors.CorruptFile, ["rank", "True"]),
        (lambda c: c.pop("r"), errors.CorruptFile, ["'r'"]),
        (lambda c: c.update(lora_alpha=[16]), errors.CorruptFile, ["alpha"]),
        (lambda c: c.update(lora_dropout=2.0), errors.CorruptFile, ["dropout"]),
        (lambda c: c.update(bias="some"), errors.CorruptFile, ["bias"]),
        (lambda c: c.update(rank_pattern=[1]), errors.CorruptFile, []),
        (lambda c: c.update(rank_pattern={"q_proj": "2"}), errors.CorruptFile, ["rank_pattern"]),
        (lambda c: c.update(rank_pattern={"(": 2}), errors.CorruptFile, ["rank_pattern"]),
        (lambda c: c.update(target_modules="("), errors.CorruptFile, ["target_modules"]),
        (lambda c: c.update(target_modules=7), errors.CorruptFile, ["target_modules"]),
        (lambda c: c.update(modules_to_save=7), errors.CorruptFile, ["modules_to_save"]),
        (lambda c: c.update(modules_to_save=["lm_head"]), errors.CorruptFile, ["lm_head"]),
        (lambda c: c.update(bias="all", target_modules=["k_proj"]), errors.CorruptFile, ["k_proj"]),
    ],
    ids=[
        *("qalora", "pissa", "pissa-niter", "loftq", "poly", "no-type", "replication", "tokens", "r-text", "r-true"),
        *("no-r", "alpha-list", "dropout-2", "bias-word", "pattern-list", "pattern-text", "pattern-regex"),
        *("targets-regex", "targets-number", "saved-number", "saved-lost", "targets-lost"),
    ],
)
def test_peft_config_that_veneer_cannot_follow(folder, change, kind, words):
    (folder / RECIPE).unlink()
    edit(folder / CONFIG, change)
    refused(folder, kind, str(folder / CONFIG), *words)


@pytest.mark.parametrize("parts", [("lora_A", "lora_B"), ("lora_A",), ("lora_B",)])
def test_peft_folder_that_lost_a_module(folder, parts):
    for part in parts:
        rewrite(folder, lambda t, part=part: t.pop(f"base_model.model.{LOST}.{part}.weight"))
    (folder / RECIPE).unlink()
    refused(folder, errors.CorruptFile, LOST, "missing")


def test_peft_folder_with_half_an_attention(tmp_path):
    """torch's attention: PEFT writes in_proj and out_proj together, so half of it is a damaged file."""
    folder = veneer.save(veneer.attach(Torch(), veneer.LoRA(rank=2), "mha"), tmp_path)
    (folder / RECIPE).unlink()
    tensors = {key: t for key, t in load_file(folder / TENSORS).items() if "out_proj" not in key}
    save_file(tensors, folder / TENSORS)
    model = Torch()
    before = snapshot(model)
    with pytest.raises(errors.FileError, match="mha"):
        veneer.load(model, folder)
    assert snapshot(model) == before


class Torch(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)


# Saving


def test_bytes_are_reproducible(good, tmp_path):
    folder, adapter = good
    again = veneer.save(adapter, tmp_path / "again")
    assert {f.name for f in again.iterdir()} == {CONFIG, TENSORS, RECIPE}
    other = veneer.save(veneer.load(FAMILIES["llama"].model(), folder), tmp_path / "other")
    for name in (CONFIG, TENSORS, RECIPE):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
        assert (other / name).read_bytes() == (folder / name).read_bytes(), "a loaded adapter is saved differently"


def small(value):
    """An adapter whose every entry is `value`, so that a mixture of two saves shows."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).requires_grad_(False)
    adapter = veneer.attach(model, veneer.LoRA(rank=16), "*")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(value)
    return adapter


def values(folder):
    loaded = veneer.load(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), folder)
    return {number for p in loaded.parameters() for number in p.unique().tolist()}


def failing(original, at):
    calls = iter(range(100))

    def call(*args, **kwargs):
        if next(calls) == at:
            raise OSError("disk full")
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_save(tmp_path, monkeypatch, step, at):
    folder = veneer.save(small(1.0), tmp_path / "adapter")
    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", failing(os.fsync, at))
        else:
            patch.setattr(Path, "replace", failing(Path.replace, at))
        with pytest.raises(OSError, match="disk full"):
            veneer.save(small(2.0), folder)
    assert {f.name for f in folder.iterdir()} == {CONFIG, TENSORS, RECIPE}, "temporary files were left"
    if step == "fsync" or at == 0:
        assert values(folder) == {1.0}
    else:
        with pytest.raises(errors.CorruptFile, match="a save was interrupted"):
            values(folder)
    veneer.save(small(2.0), folder)
    assert values(folder) == {2.0}


KILLS = """
import os, signal, sys, time, pathlib
import torch
from torch import nn
import veneer
SMALL
adapters = [small(1.0), small(2.0)]
for kill in range(16):
    folder = pathlib.Path(sys.argv[1]) / str(kill)
    child = os.fork()
    if child == 0:
        while True:
            for adapter in adapters:
                veneer.save(adapter, folder)
    while not (folder / "veneer.json").exists() and kill % 4:  # every fourth dies in or near its first save
        time.sleep(0.001)
    time.sleep(0.0013 * kill)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_save(tmp_path):
    """SIGKILL in a loop of saves: every file under a good name is whole, and a mixture of two saves is named."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLS.replace("SMALL", inspect.getsource(small)), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = 0
    for kill in range(16):
        folder = tmp_path / str(kill)
        for file in folder.iterdir() if folder.exists() else ():
            if file.name.endswith(".tmp"):
                assert file.name.startswith(".")
            elif file.suffix == ".json":
                files.read_json(file)
            else:
                files.read_tensors(file)
        if not (folder / RECIPE).exists():
            assert kill % 4 == 0
            continue
        try:
            found = values(folder)
        except errors.CorruptFile as error:
            found = str(error)
        if isinstance(found, str):
            assert "is not the file that veneer.json describes" in found
        else:
            assert found in ({1.0}, {2.0})
            loaded += 1
    assert loaded


def test_the_other_kind_of_save_removes_stale_files(tmp_path):
    model = FAMILIES["llama"].model()
    lora = veneer.attach(model, veneer.LoRA(rank=2), name="lora")
    full = veneer.attach(model, veneer.FullFineTuning(), "norm", name="full")
    perturb(full)
    for adapter, names in [
        (lora, {CONFIG, TENSORS, RECIPE}),
        (full, {OWN, RECIPE}),
        (lora, {CONFIG, TENSORS, RECIPE}),
    ]:
        veneer.save(adapter, tmp_path)
        assert {f.name for f in tmp_path.iterdir()} == names
        loaded = veneer.load(FAMILIES["llama"].model(), tmp_path)
        assert loaded.state_dict().keys() == adapter.state_dict().keys()
        assert all(torch.equal(t, adapter.state_dict()[key]) for key, t in loaded.state_dict().items())


def test_a_save_leaves_other_files_alone(tmp_path, good):
    (tmp_path / "README.md").write_text("mine")
    veneer.save(good[1], tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


# Round trips


@pytest.mark.parametrize("plain", [False, True], ids=["veneer", "peft"])
def test_also_train_is_pefts_modules_to_save(tmp_path, plain):
    model = FAMILIES["llama"].model()
    model.model.embed_tokens.requires_grad_(False)
    base, wanted = logits(model, text()), snapshot(model)
    adapter = veneer.attach(model, veneer.LoRA(rank=2), "attention.q", also_train=["lm_head"])
    perturb(adapter)
    adapted = logits(model, text())
    assert not torch.equal(adapted, base)
    folder = veneer.save(adapter, tmp_path)
    assert json.loads((folder / CONFIG).read_text())["modules_to_save"] == ["lm_head"]
    assert torch.equal(
        load_file(folder / TENSORS)["base_model.model.lm_head.weight"], adapter.state_dict()["lm_head.weight.0.value"]
    )
    if plain:
        (folder / RECIPE).unlink()
    other = FAMILIES["llama"].model()
    loaded = veneer.load(other, folder)
    assert loaded.also_train == ("lm_head",)
    assert torch.equal(logits(other, text()), adapted)
    assert all(p.requires_grad for p in loaded.parameters())
    veneer.detach(model, adapter)
    assert snapshot(model) == wanted
    assert torch.equal(logits(model, text()), base)


def test_fused_roles_round_trip_bit_for_bit(tmp_path):
    model = FAMILIES["gpt2"].model()
    adapter = veneer.attach(model, veneer.LoRA(rank=3, alpha=5.0), "attention.q | attention.v")
    perturb(adapter)
    folder = veneer.save(adapter, tmp_path)
    joined = load_file(folder / TENSORS)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert joined.shape == (96, 6)
    assert not joined[:32, 3:].any()
    assert not joined[32:64].any()
    assert not joined[64:, :3].any()
    other = FAMILIES["gpt2"].model()
    loaded = veneer.load(other, folder)
    assert [claim.place.path for claim in loaded.claims] == [claim.place.path for claim in adapter.claims]
    assert all(torch.equal(t, adapter.state_dict()[key]) for key, t in loaded.state_dict().items())
    assert torch.equal(logits(other, text()), logits(model, text()))
    (folder / RECIPE).unlink()  # as PEFT reads it: one pair at the whole of c_attn, the same sum
    other = FAMILIES["gpt2"].model()
    assert len(veneer.load(other, folder).claims) == 2
    torch.testing.assert_close(logits(other, text()), logits(model, text()), rtol=1e-10, atol=1e-10)


def test_load_under_several_names(good):
    folder, adapter = good
    model = FAMILIES["llama"].model()
    one, two = veneer.load(model, folder, name="one"), veneer.load(model, folder, name="two")
    assert veneer.adapters(model) == {"one": one, "two": two}
    alone = logits(adapter.model, text())
    for name in ("one", "two"):
        with veneer.use(model, name):
            assert torch.equal(logits(model, text()), alone)
    with torch.no_grad():
        next(two.parameters()).zero_()
    with veneer.use(model, "one"):
        assert torch.equal(logits(model, text()), alone), "the two share tensors"
    with veneer.use(model, "two"):
        assert not torch.equal(logits(model, text(IDS)), alone)


def test_state_dicts_that_do_not_fit_change_nothing():
    adapter = veneer.attach(FAMILIES["llama"].model(), veneer.LoRA(rank=2), "attention.q")
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    first, second, *_ = before
    wrong = {key: tensor + 1 for key, tensor in before.items() if key != first} | {"surplus": torch.ones(1)}
    wrong[second] = torch.ones(3)
    with pytest.raises(errors.AdapterError) as caught:
        adapter.load_state_dict(wrong)
    for words in (f"{first} is missing", "surplus is left over", f"{second} is (3,), not (32, 2)"):
        assert words in str(caught.value)
    assert all(torch.equal(t, before[key]) for key, t in adapter.state_dict().items())
