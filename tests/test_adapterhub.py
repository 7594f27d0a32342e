"""AdapterHub's folders: those in `adapterhub/`, which its own library made, and those that Veneer writes.

`adapterhub/make.py FOLDER` has their library read what `test_what_is_written_is_read_again` wrote into a folder named
in ADAPTERHUB_OUT, and compares what it computes.
"""

import importlib.util
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import perturb
from transformers import BertForMaskedLM

import veneer
from veneer import errors

HERE = Path(__file__).parent / "adapterhub"
spec = importlib.util.spec_from_file_location("adapterhub_make", HERE / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
OUTPUTS = load_file(HERE / "outputs.safetensors")
FOLDERS = [
    *(f"bert/{name}" for name in ("houlsby", "pfeiffer", "second", "third", "parallel", "prefix", "flat", "lora")),
    *(f"llama/{name}" for name in ("houlsby", "second", "prefix", "flat", "lora")),
    *(f"gpt2/{name}" for name in ("houlsby", "second")),
    "bert/second,third",
]


def expected(folder):
    return OUTPUTS[folder.replace("second,third", "fusion").replace("/", "-")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_their_library_computes_the_same(folder):
    model = make.models()[folder.split("/")[0]]
    plain = make.hidden(model)
    torch.testing.assert_close(plain, OUTPUTS[folder.split("/")[0]], rtol=1e-5, atol=1e-5)
    veneer.load(model, HERE / folder)
    assert (expected(folder) - plain).abs().max() > 1e-2
    torch.testing.assert_close(make.hidden(model), expected(folder), rtol=1e-5, atol=1e-5)


def test_a_head_over_the_model_does_not_matter():
    bare = make.models()["bert"]
    model = BertForMaskedLM(bare.config).eval()
    model.bert = bare
    adapter = veneer.load(model, HERE / "bert" / "lora")
    assert {claim.place.path.split(".")[0] for claim in adapter.claims} == {"bert"}
    with torch.no_grad():
        found = model.bert(input_ids=make.IDS).last_hidden_state
    torch.testing.assert_close(found, expected("bert/lora"), rtol=1e-5, atol=1e-5)


WRITTEN = {
    "bert-houlsby": (veneer.BottleneckAdapter.houlsby(width=3), "attention | mlp"),
    "bert-pfeiffer": (
        veneer.BottleneckAdapter(width=3, placement="after_residual", scaling="channel", norm=True),
        "mlp",
    ),
    "bert-parallel": (veneer.BottleneckAdapter(width=5, placement="parallel", activation="tanh", scaling=4.0), "mlp"),
    "bert-prefix": (veneer.PrefixTuning(length=3, reparameterization=True), None),
    "bert-lora": (veneer.LoRA(rank=2, alpha=3.0), "*.layer.1.*.query | *.layer.1.*.value | *.layer.1.output.dense"),
    "llama-houlsby": (veneer.BottleneckAdapter(width=4, bias=False, activation="silu"), "attention | mlp"),
    "llama-prefix": (veneer.PrefixTuning(length=4), None),
    "llama-lora": (veneer.LoRA(rank=3, use_rslora=True), "attention.q | attention.k | mlp.up"),
    "gpt2-pfeiffer": (veneer.BottleneckAdapter.pfeiffer(2.0), "mlp"),
}


@pytest.mark.parametrize("name", [*WRITTEN, "bert-fusion"])
def test_what_is_written_is_read_again(name, tmp_path):
    out = Path(os.environ.get("ADAPTERHUB_OUT", tmp_path))
    model = make.models()[name.split("-")[0]]
    if name == "bert-fusion":
        for part in ("one", "two"):
            perturb(veneer.attach(model, veneer.BottleneckAdapter.pfeiffer(2.0), "mlp", name=part))
        adapter = veneer.fuse(model, ["one", "two"], name="both")
    else:
        adapter = veneer.attach(model, *WRITTEN[name])
    perturb(adapter)
    computed = make.hidden(model)
    folder = veneer.export(model, adapter, out / name, to="adapterhub").folder
    save_file({"hidden": computed}, folder / "expected.safetensors")
    again = make.models()[name.split("-")[0]]
    assert (make.hidden(again) - computed).abs().max() > 1e-3
    veneer.load(again, folder)
    torch.testing.assert_close(make.hidden(again), computed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "method", "where", "words"),
    [
        ("bert", veneer.IA3(), None, "it has no IA3"),
        ("bert", veneer.LoRA(rank=2, init="pissa"), "attention.q", "cannot subtract a start"),
        ("bert", veneer.LoRA(rank=2), "attention.o", "it has no LoRA on encoder.layer.0.attention.output.dense"),
        ("llama", veneer.BottleneckAdapter.parallel(width=3), "mlp", "reads before the norm"),
        ("bert", veneer.LoRA(rank=2), "attention.q | *.layer.1.*.key", "the same places of every layer"),
    ],
)
def test_what_their_folders_cannot_hold_is_refused(family, method, where, words, tmp_path):
    model = make.models()[family]
    adapter = veneer.attach(model, method, where)
    with pytest.raises(errors.FileError, match=words):
        veneer.export(model, adapter, tmp_path / "out", to="adapterhub")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def houlsby(tmp_path):
    return Path(shutil.copytree(HERE / "bert" / "houlsby", tmp_path / "houlsby"))


def changed(folder, **options):
    content = json.loads((folder / "adapter_config.json").read_text())
    content["config"] |= options
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ln_after": True}, "ln_after=True"),
        ({"use_gating": True}, "use_gating=True"),
        ({"inv_adapter": "nice"}, "inv_adapter=nice"),
        ({"phm_layer": True}, "phm_layer=True"),
        ({"residual_before_ln": False}, "residual_before_ln=False"),
        ({"non_linearity": "gelu_new"}, "non_linearity=gelu_new"),
        ({"architecture": "reft"}, "holds 'reft'"),
    ],
)
def test_options_that_would_compute_something_else_are_refused(houlsby, options, words):
    model = make.models()["bert"]
    with pytest.raises(errors.FileError, match=words):
        veneer.load(model, changed(houlsby, **options))
    assert "_veneer" not in vars(model)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_pickle_that_would_run_code_is_not_read(houlsby, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (houlsby / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": Harm()}))
    with pytest.raises(errors.UnsafeFile, match="is no plain state dict"):
        veneer.load(make.models()["bert"], houlsby)
    assert not (tmp_path / "harmed").exists()


def test_damaged_tensors_are_named(houlsby):
    tensors = torch.load(houlsby / "pytorch_adapter.bin", weights_only=True)
    key = "encoder.layer.1.output.adapters.houlsby.adapter_up.weight"
    for name, broken in {
        "missing": {k: t for k, t in tensors.items() if k != key},
        "left over": tensors | {"encoder.layer.7.output.adapters.houlsby.adapter_up.weight": tensors[key]},
        "NaN": tensors | {key: tensors[key] * float("nan")},
        r"\(8, 3\)": tensors | {key: tensors[key][:, :3]},
    }.items():
        torch.save(broken, houlsby / "pytorch_adapter.bin")
        with pytest.raises(errors.FileError, match=name):
            veneer.load(make.models()["bert"], houlsby)


def test_old_versions_scaled_lora_by_nothing(tmp_path):
    folder = Path(shutil.copytree(HERE / "bert" / "lora", tmp_path / "lora"))
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | {"version": "adapters.1.0.1"}))
    assert {claim.method.alpha for claim in veneer.load(make.models()["bert"], folder).claims} == {2.0}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    assert {claim.method.alpha for claim in veneer.load(make.models()["bert"], folder).claims} == {4.0}


def test_a_fusion_without_its_parts_is_refused(tmp_path):
    folder = shutil.copytree(HERE / "bert" / "second,third", tmp_path / "fusion")
    with pytest.raises(errors.FileError, match="is a fusion of 'second'"):
        veneer.load(make.models()["bert"], folder)


def test_a_family_whose_names_are_not_known_is_refused():
    from tiny import FAMILIES

    with pytest.raises(errors.FileError, match="not for mixtral"):
        veneer.load(FAMILIES["mixtral"].model(), HERE / "llama" / "second")
