"""LoRA in llama.cpp's files, against what its own converter makes of the same adapter (`gguf/make.py`)."""

import importlib.util
from pathlib import Path

import gguf
import numpy
import pytest

import veneer
from veneer import errors

HERE = Path(__file__).parent / "gguf"
spec = importlib.util.spec_from_file_location("gguf_make", HERE / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_the_file_is_what_the_converter_makes(tmp_path):
    model, adapter = make.adapted()
    folder = veneer.export(model, adapter, tmp_path / "out", to="gguf-lora").folder
    assert [path.name for path in folder.iterdir()] == ["adapter.gguf"]
    ours, theirs = (gguf.GGUFReader(file) for file in (folder / "adapter.gguf", HERE / "llama.gguf"))
    mine, expected = ({tensor.name: tensor.data for tensor in one.tensors} for one in (ours, theirs))
    assert mine.keys() == expected.keys()
    assert len(mine) == 16
    for name, data in expected.items():
        numpy.testing.assert_array_equal(mine[name], data, err_msg=name)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[key].contents() == theirs.fields[key].contents()


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (veneer.LoRA(rank=4, use_rslora=True), {}, "--pad-rank"),
        (veneer.DoRA(rank=2), {}, "llama.cpp has no DoRA"),
        (veneer.LoRA(rank=2), {"family": "gpt2"}, "not for gpt2"),
    ],
)
def test_what_llama_cpp_would_not_take_is_refused(tmp_path, method, options, words):
    from tiny import FAMILIES

    model = FAMILIES[options.get("family", "llama")].model()
    adapter = veneer.attach(model, method, "attention")
    with pytest.raises(errors.FileError, match=words):
        veneer.export(model, adapter, tmp_path / "out", to="gguf-lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["embedding", "head"])
def test_an_embedding_that_is_the_head_too_ends_llama_cpp_and_is_refused(tmp_path, where):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = make.SIZES | {"num_attention_heads": 4, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    adapter = veneer.attach(model, veneer.LoRA(rank=2), where)
    with pytest.raises(errors.FileError, match="one tensor for this base's embedding and head"):
        veneer.export(model, adapter, tmp_path / "out", to="gguf-lora")


def test_one_scale_for_all_mends_rslora(tmp_path):
    model, adapter = make.adapted()
    veneer.detach(model, adapter)
    adapter = veneer.attach(model, veneer.LoRA(rank=4, alpha=6.0, use_rslora=True), "attention.q")
    folder = veneer.export(model, adapter, tmp_path / "out", to="gguf-lora", pad_rank=True).folder
    alpha = gguf.GGUFReader(folder / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    assert alpha == 8 * 6.0 / 4**0.5
