"""Sample models out of other formats: what is converted computes what the original does. No package is fetched."""

import struct
import zipfile

import numpy
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

from veneer.errors import MissingSample
from veneer.samples import flan_t5, packages, whisper

# --- ONNX in eight bits


@pytest.fixture
def t5():
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
    return model


def stored(name, weight, kind):
    """A tensor as integers, zero point and scale, and what those stand for."""
    numpy_helper = pytest.importorskip("onnx.numpy_helper")
    low, high = min(weight.min().item(), 0), max(weight.max().item(), 0)
    scale = numpy.float32((high - low) / 255)
    zero = round((0 if kind == numpy.uint8 else -128) - low / scale)
    limits = numpy.iinfo(kind)
    integers = numpy.clip((weight / scale).round() + zero, limits.min, limits.max).astype(kind)
    parts = {"quantized": integers, "zero_point": numpy.array(zero, dtype=kind), "scale": numpy.array(scale)}
    tensors = [numpy_helper.from_array(value, f"{name}_{part}") for part, value in parts.items()]
    return tensors, (integers.astype(numpy.float32) - zero) * scale


def graph(model, part):
    """The weights of an encoder or decoder as the package's graph has them; the model gets what they stand for."""
    onnx = pytest.importorskip("onnx")
    names = {ours: theirs for theirs, ours in flan_t5.PARTS.items()}
    nodes, tensors = [], []
    for name, parameter in model.named_parameters():
        top, _, rest = name.partition(".")
        if (part == "encoder") != (top == "encoder"):
            continue
        theirs, weight = f"{names[top]}.{rest}", parameter.detach().numpy()
        if "norm" in name:
            tensors.append(onnx.numpy_helper.from_array(weight, theirs))
            continue
        looked_up = "relative_attention_bias" in name or top == "shared"
        number = f"onnx::MatMul_{len(nodes)}"
        key, kind = (theirs, numpy.uint8) if looked_up else (number, numpy.int8)
        found, real = stored(key, weight if looked_up else weight.T, kind)
        tensors += found
        parameter.data = torch.tensor(real if looked_up else real.T)
        if not looked_up:
            place = theirs.removesuffix(".weight").replace(".", "/")
            for block in ("block", "layer"):
                place = place.replace(f"{block}/", f"{block}.")
            inputs = ["x", f"{number}_quantized", "x_zero_point", f"{number}_zero_point"]
            nodes.append(onnx.helper.make_node("MatMulInteger", inputs, ["y"], name=f"/{place}/MatMul_quant"))
    return onnx.helper.make_graph(nodes, part, [], [], tensors)


def test_integers_of_a_graph_become_the_weights_they_stand_for(t5):
    before = {name: parameter.clone() for name, parameter in t5.named_parameters()}
    found = {name: weight for part in ("encoder", "decoder") for name, weight in flan_t5.weights(graph(t5, part))}
    assert found.keys() == before.keys()
    assert all(torch.equal(weight, t5.get_parameter(name)) for name, weight in found.items())
    assert 0 < max((found[name] - before[name]).abs().max() for name in found) < 0.05
    made = T5ForConditionalGeneration.from_pretrained(None, config=t5.config, state_dict=found).eval()
    read, written = torch.randint(0, 40, (2, 7)), torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=read, decoder_input_ids=written).logits for model in (made, t5)))


def test_flan_t5_has_the_sizes_that_are_told():
    with torch.device("meta"):
        model = T5ForConditionalGeneration(flan_t5.config())
        tied = sum(parameter.numel() for parameter in model.parameters())
    assert tied + model.lm_head.weight.numel() == 76_961_152  # the head has weights of its own
    assert not model.config.scale_decoder_outputs


# --- CTranslate2


@pytest.fixture
def heard():
    torch.manual_seed(0)
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=4, d_model=16, max_source_positions=10, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2, **sides,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data = (torch.randn_like(parameter) / 4).half().float()
    return model


def text(value):
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def ctranslate2(model):
    """The model as CTranslate2 keeps it, in float16."""
    weights = dict(model.model.named_parameters())
    settings = [("decoder/activation", struct.pack("<b", 2), 1), ("encoder/num_heads", struct.pack("<h", 2), 2)]
    found = [text(name) + struct.pack("<BBI", 0, kind, len(value)) + value for name, value, kind in settings]

    def add(name, value):
        content = value.detach().numpy().astype("<f2").tobytes()
        sizes = struct.pack(f"<B{value.dim()}I", value.dim(), *value.shape)
        found.append(text(name) + sizes + struct.pack("<BI", 4, len(content)) + content)

    def norm(theirs, ours):
        add(f"{theirs}/gamma", weights[f"{ours}.weight"])
        add(f"{theirs}/beta", weights[f"{ours}.bias"])

    def linear(theirs, *ours):
        add(f"{theirs}/weight", torch.cat([weights[f"{name}.weight"] for name in ours]))
        biases = [weights.get(f"{name}.bias", torch.zeros(len(weights[f"{name}.weight"]))) for name in ours]
        add(f"{theirs}/bias", torch.cat(biases))

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"encoder.{conv}")
    add("decoder/embeddings/weight", weights["decoder.embed_tokens.weight"])
    for side in ("encoder", "decoder"):
        add(f"{side}/position_encodings/encodings", weights[f"{side}.embed_positions.weight"])
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for number in range(2):
            theirs, ours = f"{side}/layer_{number}", f"{side}.layers.{number}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{part}_proj" for part in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{part}_proj" for part in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(found))
    alias = struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    return head + b"".join(found) + alias


def test_a_file_of_ctranslate2_becomes_the_model_it_was_made_of(heard):
    found = dict(whisper.weights(ctranslate2(heard)))
    assert found.keys() == {name for name, _ in heard.named_parameters()}
    assert all(torch.equal(weight, heard.get_parameter(name)) for name, weight in found.items())
    made = WhisperForConditionalGeneration.from_pretrained(None, config=heard.config, state_dict=found).eval()
    sound, written = torch.randn(2, 4, 20), torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        assert torch.equal(*(model(sound, decoder_input_ids=written).logits for model in (made, heard)))


def test_whisper_has_the_sizes_that_are_told():
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(whisper.config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_760_256


# --- archives


def test_an_archive_is_there_for_as_long_as_it_is_needed(tmp_path):
    with zipfile.ZipFile(tmp_path / "small-1.0-py3-none-any.whl", "w") as files:
        files.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        files.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        files.writestr("small-1.0.dist-info/RECORD", "")
        files.writestr("small/model.bin", "weights")
    options = ("--no-index", "--find-links", str(tmp_path))
    with packages.archive("small==1.0", *options) as wheel, zipfile.ZipFile(wheel) as files:
        assert files.read("small/model.bin") == b"weights"
    assert not wheel.exists()


def test_an_archive_that_cannot_be_had_is_named():
    found = packages.archive("small==1.0", "--no-index")
    with pytest.raises(MissingSample, match=r"small==1\.0 could not be fetched: ERROR: .*small==1\.0"):
        found.__enter__()
