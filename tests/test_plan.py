"""What a plan counts on the meta device is what a real step keeps, byte for byte; and what a plan says follows."""

import copy
import json

import pytest
import tiny
import torch
from command import run
from pairwise import cover

import veneer
from veneer.errors import PlanError
from veneer.ops.loss import chunk_length
from veneer.plan import calibrating, chart, constants, devices, fitting, lines, tracing
from veneer.plan.devices import GIB
from veneer.plan.plan import Interval, plan
from veneer.seams import depths, loading

FAMILIES = ("llama", "gpt2", "bert", "t5", "gemma3", "mixtral")
LAYERS = {"gemma3": 9}
SMALL = {
    "miss": "miss:rank=8",
    "shira": "shira:rank=2",
    "oft": "oft:block_size=16",
    "compacter": "compacter:width=8",
}
"""Methods whose defaults are for larger models."""
NOT = {
    *((family, "bitfit") for family in ("llama", "gemma3", "mixtral", "t5")),
    *((family, "invertibleadapter") for family in ("llama", "gemma3", "mixtral")),
    *(("gpt2", "qlora"), ("mixtral", "ia3")),
}
"""Where a method has no place: no biases, a head or an embedding of its own kind, no linears, experts."""
CASES = [
    (family, name, checkpointing)
    for family in FAMILIES
    for name in lines.every()
    for checkpointing in (False, True)
    if (family, name) not in NOT
]


def config(family):
    model = getattr(tiny, family)()
    found = model.config
    found.architectures = [type(model).__name__]
    depth = LAYERS.get(family, 5)
    if getattr(found, "layer_types", None):
        found.layer_types = [found.layer_types[n % 2] for n in range(depth)]
    found.num_hidden_layers = depth
    if found.is_encoder_decoder:
        found.num_decoder_layers = depth
    return found


def setting(name, checkpointing=False, **options):
    one = lines.line(SMALL.get(name, name))
    given = {"where": None, "batch": 2, "sequence": 12, "dtype": torch.float32, "loss": "whole", "kind": "cpu"}
    given |= {"method": one.method, "quantization": one.quantization, "adapter_dtype": None}
    return tracing.Setting(**(given | {"checkpointing": checkpointing} | options))


def really_saved(found, wanted):
    model = loading.class_of(found)(copy.deepcopy(found)).to(wanted.dtype)
    if wanted.quantization:
        veneer.quantize(model, wanted.quantization)
    tracing.train_by(model, wanted)
    batch = {key: torch.ones(ids.shape, dtype=ids.dtype) for key, ids in tracing.inputs(found, wanted).items()}
    return tracing.saved_by(model, lambda: tracing.loss_of(model, batch, wanted.loss))[1]


@pytest.mark.parametrize(
    ("family", "name", "checkpointing"), cover(CASES, lambda case: [(case[0], case[2]), case[1], (case[1], case[2])])
)
def test_saved_bytes_are_those_of_a_real_step(family, name, checkpointing):
    found, wanted = config(family), setting(name, checkpointing)
    assert tracing.counts(found, wanted)[0]["saved"] == really_saved(found, wanted)


def test_a_loss_in_chunks_saves_what_it_really_saves():
    found, wanted = config("llama"), setting("lora", loss="chunked")
    assert tracing.counts(found, wanted)[0]["saved"] == really_saved(found, wanted)


def test_depths_keep_the_pattern_of_blocks():
    stack = depths.depths(config("gemma3"))[0]
    assert (stack.layers, stack.few, stack.more) == (9, 3, 5)


def test_a_model_as_deep_as_it_is_built_counts_as_it_is():
    """From the counts at two depths follow those of all others: of a model that is built whole, too."""
    found, wanted = config("llama"), setting("lora")
    total, _ = tracing.counts(found, wanted)
    whole = tracing._counted(found, {stack: stack.layers for stack in depths.depths(found)}, wanted)
    for key in (
        "total",
        "weights",
        "adapter",
        "trainable",
        "gradients",
        "flops",
        "calls",
        "saved",
        "kept",
        "peak loss",
    ):
        assert total[key] == whole[key], key


def test_parts_sum_to_the_peak_and_say_what_fits():
    made = veneer.plan("llama3.1:8b", veneer.LoRA(rank=8), "attention.q | attention.v", device="24GB")
    assert (made.total, made.trainable) == (8_030_261_248, 3_407_872)
    assert made.memory["weights"] == Interval.of(2 * made.total + 4 * 64)  # and the rotary frequencies
    sums = [sum(part.expected for part in parts.values()) for parts in made.phases.values()]
    assert made.peak.expected == max(sums)
    assert (
        made.memory["gradients"].expected == made.memory["adapter"].expected == made.adapter_bytes == 4 * made.trainable
    )
    assert (made.fits(40 * GIB), made.fits(15 * GIB)) == (True, False)
    assert made.unmerged.flops > 0
    assert made.merged.flops == made.merged.calls == 0
    assert made.step_seconds is None  # of a size alone no rate is known
    assert "peak: " in made.explain()
    json.dumps(made.as_dict())


def test_what_fits_is_found_and_one_more_does_not():
    made = plan(config("llama"), veneer.LoRA(rank=2), dtype=torch.float32, sequence_length=16, device="2GB")
    most = fitting.largest_batch(made, 2 * GIB)
    assert made.changed(batch_size=most).peak.expected <= 2 * GIB
    assert made.changed(batch_size=most + most // 20).peak.expected > 2 * GIB
    assert fitting.largest_batch(made, 1) == 0


def test_a_loss_in_chunks_has_the_logits_of_one_chunk():
    wide = config("llama")
    wide.vocab_size = 4096
    whole, chunked = (
        plan(wide, veneer.LoRA(rank=2), batch_size=64, sequence_length=128, dtype=torch.float32, loss=how, device="2GB")
        for how in ("whole", "chunked")
    )
    logits = chunk_length(4096) * 4096 * 4
    assert 2 * logits <= chunked.phases["loss"]["logits"].expected <= 5 * logits
    assert chunked.peak.expected < whole.peak.expected


def test_a_forward_of_four_examples_has_four_times_the_operations_of_one():
    one, four = (plan(config("llama"), None, batch_size=n, sequence_length=16, device="rtx-4090") for n in (1, 4))
    assert four.flops == 4 * one.flops
    assert four.step_seconds.expected < 4 * one.step_seconds.expected


def test_remedies_are_lower_than_what_they_mend():
    made = veneer.plan("llama3.2:1b", veneer.LoRA(rank=8), batch_size=4)
    found = fitting.remedies(made)
    assert {"checkpointing: activations computed again", "the base in 4 bits", "the loss in chunks"} <= {
        remedy.change for remedy in found
    }
    assert all(remedy.plan.peak.expected < made.peak.expected for remedy in found)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("lora", {}, "'full', a method"),
        ("full", {"quantization": "nf4"}, "cannot be trained themselves"),
        (None, {"optimizer": "adamv"}, "adamw"),
        (None, {"batch_size": 0}, "at least 1"),
        (None, {"quantization": "int3"}, "nf4"),
        (None, {"dtype": "float8"}, "float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_planned_says_so(method, options, text):
    with pytest.raises(PlanError, match=text):
        veneer.plan("llama3.2:1b", method, **options)


def test_the_command_prints_a_table_and_json(monkeypatch, capsys):
    told = ("plan", "llama3.2:1b", "--method", "lora:rank=4", "--method", "lora+prefix", "--json")
    code, out, _ = run(monkeypatch, capsys, *told)
    assert code == 0
    plans = json.loads(out)["plans"]
    assert plans["lora:rank=4"]["trainable"] < plans["lora+prefix"]["trainable"]
    assert plans["lora+prefix"]["inference"]["merged"]["flops"] > 0


def test_a_head_that_trains_whole_is_counted():
    """also_train: of a BERT with two classes, a row of weights and a bias each, and no more than that is added."""
    found = config("bert")
    found.architectures = ["BertForSequenceClassification"]
    without = veneer.plan(found, veneer.LoRA(rank=2), batch_size=2, sequence_length=8)
    headed = veneer.plan(found, veneer.LoRA(rank=2), also_train=["classifier"], batch_size=2, sequence_length=8)
    assert headed.trainable - without.trainable == 2 * (found.hidden_size + 1)
    assert headed.changed(batch_size=1).trainable == headed.trainable


def test_constants_are_fitted_and_kept_for_their_device(monkeypatch, tmp_path):
    """From steps whose time is made of known shares come these shares; a later plan on the device takes them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    terms = [(0.1, 0.02, 300.0), (0.01, 0.05, 500.0), (0.3, 0.01, 200.0), (0.02, 0.02, 900.0)]
    steps = [calibrating._Step(each, each[0] / 0.8 + each[1] / 0.5 + each[2] * 1e-5) for each in terms]
    found = calibrating._fit(steps)
    assert (found.products, found.bandwidth, found.call) == pytest.approx((0.8, 0.5, 1e-5), rel=1e-6)
    device = devices.device("rtx-4090")
    before = veneer.plan("llama3.2:1b", veneer.LoRA(rank=8), device=device)
    constants.keep(device, constants.Constants(0.25, 0.35, 1e-5, 1.5, True))
    after = veneer.plan("llama3.2:1b", veneer.LoRA(rank=8), device=device)
    assert after.step_seconds.expected == pytest.approx(2 * before.step_seconds.expected)
    assert after.step_seconds.high == pytest.approx(1.5 * after.step_seconds.expected)


def test_the_chart_is_a_picture(tmp_path):
    made = veneer.plan("llama3.2:1b", veneer.LoRA(rank=8))
    chart.draw({"lora": made}, tmp_path / "plan.png", devices.device("24GB"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_full_fine_tuning_trains_the_weights_and_the_method_copies_of_them():
    whole, copied = (veneer.plan("llama3.2:1b", method) for method in ("full", veneer.FullFineTuning()))
    assert whole.trainable == copied.trainable == whole.total
    assert whole.memory["adapter"].expected == 0
    assert copied.memory["adapter"].expected == 4 * copied.total  # float32
