"""The usual advice follows from computed figures, and changes with the constraints."""

import json
import subprocess
import sys

import pytest
from command import run
from transformers import BertConfig, MambaConfig, T5Config, ViTConfig

from veneer.errors import PlanError
from veneer.plan.choose import advice, choose
from veneer.train import recipe


def ranked(*args, **options):
    return [each.name for each in choose(*args, **options) if not each.barred]


def test_a_7b_model_on_24_gb_is_for_qlora():
    choices = choose("llama:7b", "24GB", batch=8, length=2048)
    assert choices[0].name == "QLoRA"
    lora = next(each for each in choices if each.name == "LoRA")
    assert lora.barred[0].startswith("needs ")
    assert "depends on the batch" in advice(choices)[0]


def test_a_small_batch_of_it_fits_in_16_bits():
    assert ranked("llama:7b", "24GB")[0] == "LoRA"


def test_production_without_overhead_is_for_lora_merged():
    choices = choose("llama:7b", "a100-80gb", zero_overhead=True)
    assert choices[0].name == "LoRA"
    assert any("none of 224 spots is left once merged" in reason for reason in choices[0].reasons)
    assert {each.name for each in choices if each.barred} == {"adapters", "prefix tuning", "prompt tuning"}


def test_many_tasks_are_for_adapters():
    choices = choose("bert:base", "t4", tasks=50, storage_per_task=4 * 2**20)
    assert choices[0].name == "adapters"
    assert "full fine-tuning" in [each.name for each in choices if each.barred]
    assert ranked("bert:base", "t4")[0] == "LoRA"


def test_very_few_parameters_are_for_prefix_tuning():
    assert ranked("llama:7b", "24GB", most_parameters=0.0015)[0] == "prefix tuning"
    assert ranked("llama:7b", "24GB", most_parameters=0.0001)[0] == "prompt tuning"


def test_quality_with_resources_is_for_full_fine_tuning():
    assert ranked("llama:7b", "h200", quality_first=True)[0] == "full fine-tuning"
    assert ranked("llama:7b", "24GB", quality_first=True)[0] == "LoRA"


def test_a_method_without_a_place_in_the_model_is_barred_and_the_others_are_ranked():
    mamba = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    choices = choose(mamba, "24GB")
    barred = {each.name: each.barred[0] for each in choices if each.barred}
    assert "prefix tuning" in barred
    assert "attention" in barred["prefix tuning"]
    assert choices[0].name == "LoRA"
    assert choices[-1].barred
    assert choices[-1].as_dict()["cost"] is None


def test_65b_on_little_hardware_is_for_qlora():
    assert ranked("llama:65b", "48GB") == ["QLoRA"]
    assert ranked("llama:65b", "24GB") == []


def test_too_little_time_bars():
    fast = choose("llama:7b", "h100", examples=1000, hours=1)
    assert not fast[0].barred
    slow = choose("llama:7b", "h100", examples=1000, hours=0.001)
    assert "hours for 1000 examples" in slow[0].barred[0]


def test_hours_need_examples_and_a_rate():
    with pytest.raises(PlanError, match="go together"):
        choose("llama:7b", "h100", hours=1)
    with pytest.raises(PlanError, match="How fast 24GB is"):
        choose("llama:7b", "24GB", examples=10, hours=1)


def test_every_reason_is_computed_or_cited():
    for each in choose("bert:base", "t4", tasks=2):
        assert all(reason.startswith(("computed: ", "cited: ")) for reason in each.reasons)


def test_every_recipe_is_one():
    for each in choose("bert:base", "t4"):
        read = recipe.read(each.recipe)
        assert next(iter(read.methods().values()))[0] == each.candidate.method
        assert read.model.quantization == ("nf4" if each.candidate.four_bits else None)


SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ANY = {
    "classifying encoder": BertConfig(**SMALL, architectures=["BertForSequenceClassification"]),
    "sequence to sequence": T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANY)
def test_a_folder_of_any_model_and_its_config_are_chosen_for_alike(kind, tmp_path):
    ANY[kind].save_pretrained(tmp_path)
    from_folder, from_config = (choose(model, "1GB", batch=3, length=70) for model in (tmp_path, ANY[kind]))
    assert [each.cost for each in from_folder] == [each.cost for each in from_config]
    assert recipe.read(from_folder[0].recipe).model.name == str(tmp_path)
    longer = {each.name: each.cost for each in choose(ANY[kind], "1GB", batch=24, length=300)}
    for each in from_config:
        assert longer[each.name].activations > 8 * each.cost.activations > 0, each.name


def test_what_cannot_be_planned_says_why():
    with pytest.raises(PlanError, match="ViTForImageClassification takes no token ids"):
        choose(ViTConfig(**{key: SMALL[key] for key in SMALL if key != "vocab_size"},
                         architectures=["ViTForImageClassification"]), "1GB")  # fmt: skip
    with pytest.raises(PlanError, match="A sequence of 700 is longer than the model's 512 positions"):
        choose(ANY["classifying encoder"], "1GB", length=700)


def test_the_command_prints_what_it_chose(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "choose", "bert:base", "--gpu", "t4", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["choices"][0]["method"] == "LoRA"
    assert found["later_evidence"]


def test_nothing_is_said_that_was_not_asked():
    """torchao, bitsandbytes and torch warn while they are imported, of what is no business of this command's."""
    command = [sys.executable, "-m", "veneer", "choose", "bert:base", "--gpu", "t4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert json.loads(done.stdout)["choices"]
