"""Adapters in other programs' files, and what those programs would not take of them."""

import json

import pytest
import torch
from command import run
from peft import PeftModel
from safetensors.torch import load_file
from tiny import FAMILIES, logits, perturb, text
from transformers import AutoModelForCausalLM

import veneer
from veneer import errors
from veneer.interop.servers import RANKS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QV = "attention.q | attention.v"
METHODS = {
    "mixed": veneer.LoRA(rank=3, alpha=6.0, rank_pattern={"v_proj": 5}, alpha_pattern={"*.layers.0.*": 11.0}),
    "rslora": veneer.LoRA(rank=4, alpha=8.0, use_rslora=True),
    "pissa": veneer.LoRA(rank=2, init="pissa"),
    "dora": veneer.DoRA(rank=2),
    "vera": veneer.VeRA(rank=4),
}


def made(method, also_train=(), where=QV, family="llama"):
    model = FAMILIES[family].model()
    adapter = veneer.attach(model, method, where, also_train=also_train)
    perturb(adapter, 0.05)
    return model, adapter


def in_peft(folder, family="llama"):
    return logits(PeftModel.from_pretrained(FAMILIES[family].model(), folder).eval(), text())


@pytest.mark.parametrize("name", ["mixed", "rslora", "pissa"])
def test_one_rank_and_scale_compute_the_same(tmp_path, name):
    model, adapter = made(METHODS[name])
    with torch.no_grad():
        expected = logits(model, text())
    exported = veneer.export(model, adapter, tmp_path / "out", pad_rank=True)
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((exported.folder / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (8, {}, {}, False)
    assert {
        t.shape[0] for key, t in load_file(exported.folder / "adapter_model.safetensors").items() if "_A" in key
    } == {8}
    with torch.no_grad():
        torch.testing.assert_close(in_peft(exported.folder), expected, rtol=1e-6, atol=1e-6)
    assert [one.kind for one in veneer.refusals(exported.folder, "vllm")] == []
    assert veneer.refusals(exported.folder, "llama.cpp") == []
    assert veneer.adapters(model).keys() == {"default"}


def test_what_is_no_lora_is_brought_to_one_and_the_model_is_left_as_it_was(tmp_path):
    model, adapter = made(METHODS["dora"])
    with torch.no_grad():
        expected = logits(model, text())
    exact = veneer.export(model, adapter, tmp_path / "exact", lora_rank=32)
    low = veneer.export(model, adapter, tmp_path / "low", lora_rank=4)
    assert max(exact.errors.values()) < 1e-6
    assert 0 < max(low.errors.values()) < 1
    with torch.no_grad():
        torch.testing.assert_close(in_peft(exact.folder), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(model, text()), expected)
    assert veneer.adapters(model).keys() == {"default"}


def test_what_was_trained_whole_is_left_out(tmp_path):
    model, adapter = made(veneer.LoRA(rank=2), also_train=["lm_head"])
    veneer.save(adapter, tmp_path / "saved")
    for server, kind in {"vllm": "refused", "sglang": "wrong", "llama.cpp": "refused"}.items():
        first = veneer.refusals(tmp_path / "saved", server)[0]
        assert (first.kind, "lm_head" in first.what, "--drop-whole" in first.way_out) == (kind, True, True)
    assert veneer.refusals(tmp_path / "saved", "peft") == []
    exported = veneer.export(model, adapter, tmp_path / "out", drop_whole=True)
    assert veneer.refusals(exported.folder, "vllm") == []
    kept = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    left = load_file(exported.folder / "adapter_model.safetensors")
    assert kept.keys() - left.keys() == {"base_model.model.lm_head.weight"}
    assert all(torch.equal(kept[key], left[key]) for key in left)


@pytest.mark.parametrize(
    ("method", "server", "kind", "words"),
    [
        ("dora", "vllm", "refused", "no DoRA"),
        ("dora", "sglang", "refused", "no DoRA"),
        ("mixed", "sglang", "refused", "different ranks"),
        ("mixed", "llama.cpp", "wrong", "different alphas"),
        ("rslora", "sglang", "wrong", "sqrt"),
        ("rslora", "llama.cpp", "wrong", "sqrt"),
        ("vera", "vllm", "refused", "VERA"),
    ],
)
def test_a_server_would_not_take_it(tmp_path, method, server, kind, words):
    _, adapter = made(METHODS[method])
    found = [one for one in veneer.refusals(veneer.save(adapter, tmp_path), server) if one.kind != "setting"]
    assert [(one.kind, words in one.what) for one in found] == [(kind, True)]


@pytest.mark.parametrize("method", ["mixed", "rslora", "pissa"])
def test_vllm_knows_the_scale_and_rank_of_every_module(tmp_path, method):
    _, adapter = made(METHODS[method])
    assert veneer.refusals(veneer.save(adapter, tmp_path), "vllm") == []


def test_a_rank_needs_a_setting_or_is_too_large(tmp_path):
    _, adapter = made(veneer.LoRA(rank=17), where="mlp")
    (found,) = veneer.refusals(veneer.save(adapter, tmp_path / "a"), "vllm")
    assert (found.kind, "--max-lora-rank 32" in found.way_out) == ("setting", True)
    _, adapter = made(veneer.LoRA(rank=RANKS[-1] + 1), where="*.layers.0.mlp.up_proj")
    (found,) = veneer.refusals(veneer.save(adapter, tmp_path / "b"), "vllm")
    assert (found.kind, "--lora-rank 512" in found.way_out) == ("refused", True)


def test_methods_that_no_server_has(tmp_path):
    model, adapter = made(veneer.BottleneckAdapter(width=4), where="mlp")
    (found,) = veneer.refusals(veneer.save(adapter, tmp_path / "a"), "vllm")
    assert found.kind == "refused"
    with pytest.raises(errors.FileError, match="PEFT's files cannot hold"):
        veneer.export(model, adapter, tmp_path / "out")
    with pytest.raises(errors.NotMergeable):
        veneer.export(model, adapter, tmp_path / "out", lora_rank=4)
    assert not (tmp_path / "out").exists()
    assert veneer.adapters(model).keys() == {"default"}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (veneer.LoRA(rank=2), {"drop_whole": True}, "drop_whole would change nothing"),
        (veneer.LoRA(rank=2), {"to": "merged", "pad_rank": True}, "pad_rank would change nothing"),
        (veneer.VeRA(rank=2), {"pad_rank": True}, "pad_rank is for LoRA on single matrices, and this is VERA"),
        (veneer.LoRA(rank=600), {"pad_rank": True}, "lora_rank=512"),
        (veneer.LoRA(rank=2), {"to": "onnx"}, "to='onnx' is none of"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(tmp_path, method, options, message):
    model, adapter = made(method, where="*.layers.0.mlp.up_proj")
    with pytest.raises(errors.VeneerError, match=message):
        veneer.export(model, adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def base(tmp_path):
    FAMILIES["llama"].model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    adapter = veneer.attach(model, METHODS["dora"], QV)
    perturb(adapter, 0.05)
    with torch.no_grad():
        return veneer.save(adapter, tmp_path / "dora"), logits(model.eval(), text())


def test_the_command_checks_writes_and_merges(saved, tmp_path, monkeypatch, capsys):
    folder, expected = saved
    code, out, _ = run(monkeypatch, capsys, "export", folder, "--check", "vllm")
    assert (code, out.startswith("refused: vLLM has no DoRA.")) == (1, True)
    plain = tmp_path / "plain"
    words = ["--to", "peft", "--output", plain, "--lora-rank", 32, "--pad-rank", "--check", "vllm", "--json"]
    code, out, _ = run(monkeypatch, capsys, "export", folder, *words)
    done = json.loads(out)
    assert (code, done["to"], [one["kind"] for one in done["findings"]]) == (0, "peft", ["setting"])
    assert len(done["errors"]) == 4
    with torch.no_grad():
        torch.testing.assert_close(in_peft(plain), expected, rtol=1e-5, atol=1e-5)
        code, _, _ = run(monkeypatch, capsys, "export", folder, "--to", "merged", "--output", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
        torch.testing.assert_close(logits(merged, text()), expected, rtol=1e-9, atol=1e-9)
    assert code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give --to with --output to write, --check to check, or both."),
        (["--to", "peft"], "--to and --output go together: what to write, and where."),
        (["--check", "vllm", "--pad-rank"], "change what is written. Give --to as well."),
        (["--check", "tgi"], "'tgi' is none of vllm, sglang, llama.cpp, peft."),
        (
            ["--check", "vllm", "--to", "merged", "--output", "x"],
            "--to merged writes no adapter in them. Leave --check out.",
        ),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(saved, monkeypatch, capsys, words, message):
    code, _, err = run(monkeypatch, capsys, "export", saved[0], *words)
    assert (code, message in err) == (2, True)


class Hub:
    """What is asked of the Hub, which is not there in tests."""

    uploads: list = []  # noqa: RUF012
    refuses = False

    def create_repo(self, name, *, private, exist_ok):
        if self.refuses:
            raise ConnectionError("401 Unauthorized")
        assert private
        assert exist_ok
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.uploads.append((repo_id, {path.name: path.read_bytes() for path in folder_path.iterdir()}))


def test_an_exported_folder_goes_onto_the_hub_with_a_card(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    (tmp_path / "report.json").write_text('{"before": {"loss": 2.5}, "metrics": {"loss": 1.25}}', encoding="utf-8")
    words = ["export", saved[0], "--to", "peft", "--output", tmp_path / "out", "--push"]
    code, out, _ = run(monkeypatch, capsys, *words, "me/old-english")
    ((name, sent),) = Hub.uploads
    assert (code, name, "Uploaded to https://hub/me/old-english." in out) == (0, "me/old-english", True)
    assert sorted(sent) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = sent["README.md"].decode()
    assert card.startswith("---\nlibrary_name: peft\ntags: [veneer]\n---\n\n# old-english\n")
    assert "| loss | 2.5 | 1.25 |" in card
    assert 'veneer.load(model, "me/old-english")' in card
    monkeypatch.setattr(Hub, "refuses", True)
    words[5] = tmp_path / "second"
    code, _, err = run(monkeypatch, capsys, *words, "me/old-english")
    assert (code, "uploading it to me/old-english failed: 401 Unauthorized" in err) == (2, True)
    assert (tmp_path / "second" / "adapter_config.json").exists()


def test_a_hub_id_is_loaded_at_its_revision(tmp_path, monkeypatch):
    model, adapter = made(veneer.LoRA(rank=2))
    folder = veneer.save(adapter, tmp_path / "saved")
    asked = []

    def fetched(name, *, revision, allow_patterns):
        asked.append((name, revision))
        assert {"veneer.json", "adapter_config.json", "adapter_model.safetensors"} <= set(allow_patterns)
        if revision == "gone":
            raise ConnectionError("404 Not Found")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    again = FAMILIES["llama"].model()
    veneer.load(again, "me/old-english", revision="v2")
    assert asked == [("me/old-english", "v2")]
    with torch.no_grad():
        assert torch.equal(logits(again, text()), logits(model, text()))
    with pytest.raises(errors.FileError, match="fetching it from the Hub failed: 404"):
        veneer.load(again, "me/old-english", name="b", revision="gone")
    with pytest.raises(errors.FileError, match="has no revision 'v2'"):
        veneer.load(again, folder, name="b", revision="v2")
