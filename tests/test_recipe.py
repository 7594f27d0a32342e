"""Reading a recipe: short forms, overrides, and all mistakes at once with their lines."""

import dataclasses
import json
from pathlib import Path

import pytest

import veneer
from veneer import methods
from veneer.errors import RecipeError
from veneer.train import lines, recipe, shipped

SHORT = "model: some/model\nmethod: LoRA\ndata: rows.jsonl\noutput: runs/one\n"
SCHEMA = Path(__file__).parents[1] / "docs" / "recipe.schema.json"


def mistakes(text, overrides=()):
    with pytest.raises(RecipeError) as caught:
        recipe.read(text, "r.yaml", overrides)
    return str(caught.value).splitlines()


def test_four_lines_are_enough():
    found = recipe.read(SHORT)
    assert found.model.name == "some/model"
    assert found.methods() == {"linear": (veneer.LoRA(),)}
    assert found.learning_rate == veneer.LoRA.learning_rate
    assert found.data.paths == ["rows.jsonl"]


def test_methods_go_where_they_are_told_with_their_options():
    text = SHORT.replace("method: LoRA", "method:\n  LoRA: {rank: 4, where: attention.q}\n  IA3:\n  BitFit: {}")
    found = recipe.read(text)
    expected = {
        "attention.q": (veneer.LoRA(rank=4),),
        veneer.IA3.default_where: (veneer.IA3(),),
        "*": (veneer.BitFit(),),
    }
    assert found.methods() == {key: expected[key] for key in found.methods()}
    assert set(found.methods()) == {"attention.q", veneer.IA3.default_where, veneer.BitFit.default_where}
    assert found.learning_rate == min(veneer.LoRA.learning_rate, veneer.IA3.learning_rate, veneer.BitFit.learning_rate)


def test_the_methods_of_recipes_are_those_of_the_package():
    names = set(recipe.method_options())
    assert names == set(methods.__all__)
    for name in names - {"AdapterFusion", "Gated"}:
        fields = {field.name for field in dataclasses.fields(vars(methods)[name])}
        assert set(recipe.method_options()[name].model_fields) == fields | {"where"}


def test_gates_stand_around_the_methods_below_them():
    text = SHORT.replace(
        "method: LoRA", "method:\n  Gated:\n    LoRA: {rank: 4, where: attention.q}\n    PrefixTuning:"
    )
    found = recipe.read(text)
    prefix = veneer.PrefixTuning.default_where
    assert found.methods() == {
        "attention.q": (veneer.Gated(veneer.LoRA(rank=4)),),
        prefix: (veneer.Gated(veneer.PrefixTuning()),),
    }
    assert found.learning_rate == min(veneer.LoRA.learning_rate, veneer.PrefixTuning.learning_rate)
    assert recipe.read(found.yaml()).methods() == found.methods()


def test_options_that_are_lists_become_what_methods_take():
    text = SHORT.replace("method: LoRA", "method:\n  TrainableTokens: {tokens: [3, 5]}")
    assert list(*recipe.read(text).methods().values()) == [veneer.TrainableTokens(tokens=(3, 5))]


def test_overrides_are_on_top():
    changes = [
        "training.learning_rate=1e-4",
        "method.LoRA.rank=2",
        "model.dtype=bfloat16",
        "data.held_out=7",
        "output=x",
    ]
    found = recipe.read(SHORT, overrides=changes)
    assert found.training.learning_rate == 1e-4
    assert found.methods() == {"linear": (veneer.LoRA(rank=2),)}
    assert found.model.dtype == "bfloat16"
    assert found.data.held_out == 7
    assert found.output == "x"


def test_all_mistakes_are_said_at_once_with_their_lines_and_the_nearest_name():
    text = """\
model: {name: a, dtyp: x}
method:
  LoRa: {rank: 8}
  DoRA: {rank: 0, dropuot: 0.1}
data: {path: x, heldout: 0.1}
training: {steps: 5, schedule: cosin, batch_size: 1.5, seed: yes, learning_rate: -1}
evaluation: {limit: 3}
optput: x
"""
    found = mistakes(text, ["foo", "training.wrmup=1"])
    for start, end in (
        ("'foo' is no key=value", ""),
        ("r.yaml, line 1: model.dtyp is no option.", "Closest: dtype."),
        ("r.yaml, line 3: method.LoRa is no option.", "Closest: LoRA, LoHa, LoRAFA."),
        ("r.yaml, line 4: method.DoRA.rank should be greater than or equal to 1, not 0.", ""),
        ("r.yaml, line 4: method.DoRA.dropuot is no option.", "Closest: dropout."),
        ("r.yaml, line 5: data.heldout is no option.", "Closest: held_out."),
        ("r.yaml, line 6: training.schedule should be 'cosine', 'linear' or 'constant'", "Closest: cosine."),
        ("r.yaml, line 6: training.batch_size should be a valid integer, not 1.5.", ""),
        ('r.yaml, line 6: training.seed should be a valid integer, not "yes".', ""),
        ("r.yaml, line 6: training.learning_rate should be greater than 0, not -1.", ""),
        ("r.yaml, line 7: evaluation: limit without metrics of written answers", ""),
        ("r.yaml, line 8: optput is no option.", "Closest: output."),
        ("'training.wrmup=1': training.wrmup is no option.", "Closest: warmup."),
        ("r.yaml, line 1: output is missing.", ""),
    ):
        assert [line for line in found if line.startswith(start) and line.endswith(end)], (start, found)
    assert len(found) == 14


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "r.yaml, line 1: this is no YAML"),
        ("- a\n- b", "r.yaml holds no mapping"),
        ("", "r.yaml holds no mapping"),
        (SHORT + "model: other\n", "r.yaml, line 5: model stands there twice. Keep one."),
        (SHORT + "training: {epochs: 1, steps: 2}\n", "r.yaml, line 5: training: epochs and steps say the same"),
        (SHORT + "training: {batch_size: 6, micro_batch_size: 4}\n", "micro_batch_size 4 does not divide batch_size 6"),
        (SHORT.replace("LoRA", "{}"), "r.yaml, line 2: no method is named. There are: AdaLoRA, AdapterFusion, BitFit"),
        (SHORT.replace("LoRA", "Gated"), "r.yaml, line 2: Gated names no method to put a gate on"),
        (SHORT.replace("LoRA", "{LoRA: , AdapterFusion: {parts: [a, b]}}"), "line 2: AdapterFusion stands alone"),
        (SHORT.replace("LoRA", "{AdapterFusion: {parts: [a]}}"), "method.AdapterFusion.parts"),
        (SHORT.replace("LoRA", "{Gated: {LoRA: {rnk: 3}}}"), "line 2: method.Gated.LoRA.rnk is no option."),
        (SHORT.replace("LoRA", "{BottleneckAdapter: {width: 4, reduction_factor: 2.0}}"), ""),
    ],
    ids=[
        "no YAML", "a list", "nothing", "twice", "two lengths", "a broken step", "no method", "an empty gate",
        "no fusion alone", "one part", "in a gate", "fits",
    ],
)  # fmt: skip
def test_what_no_option_alone_can_say(text, message):
    if message:
        assert any(message in line for line in mistakes(text))
    else:
        assert recipe.read(text).methods()


def test_numbers_are_numbers_and_words_are_words():
    found = lines.read(
        "a: 1e-4\nb: on\nc: 2026-11-24\nd: 1.\ne: .5\nf: true\ng: 010\nh: ~\ni: '3'\nj: 1_000\n", "r"
    ).data
    expected = {
        "a": 1e-4,
        "b": "on",
        "c": "2026-11-24",
        "d": 1.0,
        "e": 0.5,
        "f": True,
        "h": None,
        "i": "3",
        "j": "1_000",
    }
    assert {key: found[key] for key in expected} == expected


def test_a_recipe_written_out_reads_the_same():
    found = recipe.read(SHORT, overrides=["data.held_out=3", "method.VeRA.rank=16"])
    assert recipe.read(found.yaml()) == found
    assert recipe.read(found.yaml()).methods() == found.methods()


@pytest.mark.parametrize(
    ("written", "trackers"),
    [
        ("none", []),
        ("[none]", []),
        ("[]", []),
        ("wandb", ["wandb"]),
        ("[mlflow, tensorboard]", ["mlflow", "tensorboard"]),
    ],
)
def test_trackers_are_one_name_or_several_or_none(written, trackers):
    found = recipe.read(SHORT, overrides=[f"training.trackers={written}"])
    assert found.training.trackers == trackers
    assert recipe.read(found.yaml()) == found


def test_an_unknown_tracker_is_named_with_the_nearest_and_one_twice_is_refused():
    [mistake] = mistakes(SHORT, ["training.trackers=[wandb, wandb]"])
    assert "trackers wandb, wandb names one twice; keep one" in mistake
    [mistake] = mistakes(SHORT, ["training.trackers=wnadb"])
    assert mistake.endswith("Closest: wandb, swanlab.")


def test_the_schema_is_published():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == recipe.schema(), "run scripts/recipe_schema.py"


@pytest.mark.parametrize("name", shipped.every())
def test_a_shipped_recipe_reads(name):
    assert recipe.load(shipped.find(name)).methods()


def test_an_unknown_recipe_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match=r"is no file.*Closest: film-reviews"):
        shipped.find("film-review")
    with pytest.raises(RecipeError, match=r"Closest: film-reviews"):
        shipped.named("film-review")
