"""The commands that run recipes and use what came of them, as a user calls them."""

import json

import pytest
import small_run
from command import run

from veneer.train import answering


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("small"))


def test_train_eval_and_generate(recipe, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "train", recipe, f"output={tmp_path / 'out'}", "--json")
    report = json.loads(out)
    assert code == 0
    assert "step 6/6" in err
    assert report["metrics"]["loss"] < report["before"]["loss"]
    adapter = tmp_path / "out" / "adapter"
    code, out, _ = run(monkeypatch, capsys, "eval", adapter, "--json")
    assert json.loads(out)["adapted"]["loss"] == pytest.approx(report["metrics"]["loss"])
    assert json.loads(out)["base"]["loss"] == pytest.approx(report["before"]["loss"])
    code, out, _ = run(monkeypatch, capsys, "eval", adapter, "data.held_out=7", "evaluation={metrics: [exact_match]}")
    assert "exact match" in out
    (tmp_path / "prompts").write_text("thou 3\nthou 4\n", encoding="utf-8")
    code, out, _ = run(
        monkeypatch, capsys, "generate", adapter, "--file", tmp_path / "prompts", "--max-new-tokens", 4, "--json"
    )
    answers = json.loads(out)
    assert [one["prompt"] for one in answers] == ["thou 3", "thou 4"]
    code, out, _ = run(monkeypatch, capsys, "generate", adapter, "thou 3", "--max-new-tokens", 4)
    assert code == 0
    assert out.strip() == answers[0]["answer"]
    asked = []
    encode = answering.encode_prompt
    monkeypatch.setattr(
        answering, "encode_prompt", lambda t, example: asked.append(example.system) or encode(t, example)
    )
    for told in (["--system", "Another voice."], []):
        assert run(monkeypatch, capsys, "generate", adapter, "thou 3", *told, "--max-new-tokens", 4)[0] == 0
    assert asked == ["Another voice.", ""]
    kept = tmp_path / "out" / "checkpoints" / "checkpoint-6"
    found = json.loads(run(monkeypatch, capsys, "inspect", kept, "--json")[1])
    assert (found["step"], found["of"], found["state"].split(":")[0]) == (6, 6, "whole")
    (kept / "trainer_state.json").write_text('{"global_step": 6}', encoding="utf-8")
    assert "damaged: trainer_state.json" in run(monkeypatch, capsys, "inspect", kept)[1]
    code, _, err = run(monkeypatch, capsys, "train", recipe, f"output={tmp_path / 'out'}")
    assert code == 2
    output = tmp_path / "out"
    assert err == f"veneer: {output} holds a finished run. Name another output, such as output={output}-2.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "nowhere.yaml"],
            "nowhere.yaml is no file, and no recipe that Veneer brings. See: veneer recipes list",
        ),
        (
            ["train", "film-reviews", "training.stps=3"],
            "'training.stps=3': training.stps is no option. Closest: steps, loss.",
        ),
        (
            ["generate", ".", "hello"],
            ". holds no recipe.yaml, so no recipe made it. Name a folder such as runs/x/adapter.",
        ),
        (["generate", "."], "Give a prompt or --file, one of the two."),
        (["recipes", "show", "vrses"], "'vrses' is no recipe that Veneer brings. Closest: verses, verse-pairs."),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(monkeypatch, capsys, words, message):
    assert run(monkeypatch, capsys, *words) == (2, "", f"veneer: {message}\n")


def test_shipped_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "recipes", "list", "--json")
    found = json.loads(out)
    assert found.keys() == {"digits", "film-reviews", "phone-prompts", "verse-pairs", "verses", "word-problems"}
    _, out, _ = run(monkeypatch, capsys, "recipes", "list")
    assert out.splitlines()[0].split()[0] == "digits"
    _, shown, _ = run(monkeypatch, capsys, "recipes", "show", "verses")
    assert run(monkeypatch, capsys, "recipes", "copy", "verses", tmp_path / "my.yaml")[0] == 0
    assert (tmp_path / "my.yaml").read_text(encoding="utf-8") == shown
    code, _, err = run(monkeypatch, capsys, "recipes", "copy", "verses", tmp_path / "my.yaml")
    assert code == 2
    assert "my.yaml cannot be written: File exists." in err
