"""Comparing methods: runs in processes of their own, going on, failures, intervals, and what is told of it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import small_run
from command import call
from command import run as command
from scipy import stats

from veneer.compare import Budget, Search, cells, charts, compare, predicting, report, running, statistics, summary
from veneer.compare.contenders import contenders, learning_rates, sweeps
from veneer.errors import RecipeError
from veneer.train import recipe as recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("small")).parent


@pytest.fixture(scope="module")
def words(folder):
    """A command of two methods and two seeds on classes; a row's text looks like the end of a script."""
    rows = [json.loads(line) for line in (folder / "classes.jsonl").read_text().splitlines()]
    small_run.write(folder / "marked.jsonl", [row | {"text": f"</script><b>{row['text']}"} for row in rows])
    return [
        "compare", folder / "recipe.yaml", f"model={folder}/bert", f"data={folder}/marked.jsonl", "data.held_out=12",
        "--methods", "lora,adapter", "--seeds", "2", "--budget", "steps=4", "--output", folder / "compared",
    ]  # fmt: skip


class Forking(running._Worker):
    """Cells in processes forked off this one, which has all modules."""

    ran: ClassVar[list[str]] = []

    def run(self, file):
        self.ran.append(f"{file.parent.parent.name}/{file.parent.name}")
        child = os.fork()
        if not child:
            cells._inside(file)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def forked(monkeypatch):
    """The cells that run from here on."""
    monkeypatch.setattr(running, "_Worker", Forking)
    Forking.ran.clear()
    return Forking.ran


@pytest.fixture(scope="module")
def compared(folder, words):
    """A comparison that was killed in its second run and started again: (its folder, when the first run ended)."""
    output = folder / "compared"
    first, second = (output / "cells" / "lora" / f"seed-{seed}" for seed in range(2))
    child = os.fork()
    if not child:
        try:
            call(pytest.MonkeyPatch(), *words)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 300
    while not (second / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ended = (first / "result.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_Worker", Forking)
        assert call(patch, *words) == 0
    return output, ended


@pytest.fixture
def found(compared):
    return json.loads((compared[0] / "comparison.json").read_text(encoding="utf-8"))


# --- running


def test_a_killed_comparison_goes_on_and_runs_nothing_twice(compared, words, forked, monkeypatch, capsys):
    output, ended = compared
    assert (output / "cells" / "lora" / "seed-0" / "result.json").stat().st_mtime_ns == ended
    assert not list(output.rglob("checkpoint-*"))
    code, out, _ = command(monkeypatch, capsys, *words, "--json")
    assert code == 0
    assert forked == []
    found = json.loads(out)
    assert [(one["name"], one["seeds"], one["failures"]) for one in found["methods"]] == [
        ("lora", [0, 1], {}),
        ("adapter", [0, 1], {}),
    ]
    _, out, _ = command(monkeypatch, capsys, *words)
    assert "accuracy" in out
    assert "comparison.html" in out


def test_figures_are_those_of_the_runs(compared, found):
    output, _ = compared
    runs = [json.loads((output / f"cells/adapter/seed-{seed}/result.json").read_text()) for seed in range(2)]
    adapter = found["methods"][1]
    right = np.array([run["examples"]["values"] for run in runs])
    assert right.shape == (2, 12)
    assert adapter["quality"]["mean"] == pytest.approx(right.mean())
    assert adapter["quality"]["mean"] == pytest.approx(np.mean([run["metrics"]["accuracy"] for run in runs]))
    lora = [json.loads((output / f"cells/lora/seed-{seed}/result.json").read_text()) for seed in range(2)]
    other = np.array([run["examples"]["values"] for run in lora])
    assert adapter["difference"]["mean"] == pytest.approx((right - other).mean())
    assert runs[0]["examples"]["texts"] == lora[1]["examples"]["texts"]  # one held-out set for all seeds
    assert runs[0]["curve"]["training"] != runs[1]["curve"]["training"]
    for run in (*runs, *lora):
        assert run["steps"] == len(run["curve"]["training"]) == 4
        assert run["start_bytes"] < run["peak_bytes"]
    assert "inference" in runs[0]
    assert "inference" not in runs[1]
    assert set(found["methods"][0]["inference"]) == {"unmerged", "merged"}
    assert set(found["methods"][0]["inference"]["merged"]) == {"1", "16"}
    assert "BottleneckAdapter" in adapter["inference"]["not_merged"]
    assert adapter["forgetting"]["drift"] > 0
    place = output / "cells/adapter/seed-0/run/adapter"
    assert adapter["adapter_bytes"] == sum(path.stat().st_size for path in place.glob("*.safetensors")) > 0


def test_the_peak_stands_beside_what_a_plan_expects(compared, found):
    """Numbers that train take 4 bytes, two moments of each 8; the weights are those of the base with its head."""
    runs = [json.loads((compared[0] / f"cells/lora/seed-{seed}/result.json").read_text()) for seed in range(2)]
    lora = found["methods"][0]
    expected = lora["predicted"]
    assert expected["before"] == lora["start_bytes"] == np.mean([run["start_bytes"] for run in runs])
    assert expected["adapter"] == 4 * lora["trainable"]
    assert expected["weights"] >= 4 * (lora["total"] - lora["trainable"])
    assert expected["activations"] > 0
    assert expected["optimizer"] >= 8 * lora["trainable"]
    assert lora["predicted_bytes"] == sum(expected.values())
    row = next(csv.DictReader(summary.table_csv(found).splitlines()))
    assert float(row["predicted_bytes"]) == lora["predicted_bytes"]
    shown = dict(zip(summary.COSTS, summary.cost_rows(found)[0], strict=True))
    assert shown["predicted MiB"] == f"{lora['predicted_bytes'] / 2**20:,.0f}"
    assert shown["off by"] == f"{lora['predicted_bytes'] / lora['peak_bytes'] - 1:+.0%}"
    page = report.html(found)
    assert f"lora, predicted: weights: {expected['weights'] / 2**20:,.4g} MiB" in page
    assert f"lora, measured: all beyond it: {(lora['peak_bytes'] - lora['start_bytes']) / 2**20:,.4g} MiB" in page


def test_what_has_no_plan_says_why(folder, found):
    recipe = recipes.load(folder / "recipe.yaml")
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "bitsandbytes-8bit"})})
    for rows, one, why in (
        ("chosen_ids", recipe, "not those of preference"),
        ("input_ids", other, "bitsandbytes-8bit"),
    ):
        prepared = SimpleNamespace(task="preference", train=SimpleNamespace(column_names=[rows]))
        assert why in predicting.parts(SimpleNamespace(recipe=one), prepared, 0)
    lora = found["methods"][0]
    del lora["predicted"], lora["predicted_bytes"]
    lora["not_predicted"] = "It <has> no plan."
    assert summary.cost_rows(found)[0][2:4] == ["not planned", ""]
    assert summary.cost_rows(found)[1][2] != "not planned"
    assert "Not predicted: It &lt;has&gt; no plan." in report.html(found)


def test_another_budget_in_the_same_folder_is_refused(words, compared, forked, monkeypatch, capsys):
    changed = ["steps=5" if word == "steps=4" else word for word in words]
    code, _, err = command(monkeypatch, capsys, *changed)
    assert code == 2
    assert "holds a run by another recipe or budget. Name another output, or delete that folder." in err


def test_a_search_a_budget_of_tokens_a_sweep_and_a_failed_method(folder, tmp_path, forked):
    recipe = recipes.load(folder / "recipe.yaml")
    (tmp_path / "text").write_text("A plain text of a few words, over and over. " * 40, encoding="utf-8")
    found = compare(
        recipe, ["lora", "prefix"], tmp_path / "out", seeds=1, budget=Budget("tokens", 300), search=Search(2),
        sweep={"where": ["attention", "nowhere"]}, base="lora where=attention", text=str(tmp_path / "text"),
    )  # fmt: skip
    lora, failed, prefix, other = found.outcomes
    assert "nowhere" in failed.failures["all"]
    assert other.failures.keys() == {"all"}
    assert not failed.results
    assert len(forked) == 2 * (2 + 1) + 2
    trials = [tmp_path / "out/cells/lora-where=attention" / f"search-{rate:g}" for rate in Search(2).around(1e-2)]
    assert [json.loads((trial / "result.json").read_text())["metrics"]["loss"] for trial in trials] == list(
        lora.searched.values()
    )
    assert lora.results[0]["learning_rate"] == min(lora.searched, key=lora.searched.get)
    assert abs(lora.results[0]["tokens"] - 300) < 100
    assert lora.results[0]["steps"] == prefix.results[0]["steps"]
    told = summary.of(found)
    assert told["quality"] == "loss"
    assert not told["higher_is_better"]
    assert told["methods"][0]["quality"]["mean"] == pytest.approx(lora.results[0]["metrics"]["loss"], rel=1e-4)
    assert set(told["methods"][0]["forgetting"]) == {"before", "after"}
    assert set(told["methods"][2]["inference"]["unmerged"]["1"]) == {"prefill", "decode"}
    rows = list(csv.DictReader(summary.table_csv(told).splitlines()))
    assert "nowhere" in rows[1]["failure"]
    assert "nowhere" in report.html(told)
    assert any("failed: " in cell for row in summary.trained_rows(told) for cell in row)


def test_a_search_sees_no_held_out_row(folder):
    from veneer.train import models
    from veneer.train.data import prepare

    recipe = recipes.load(folder / "recipe.yaml")
    whole = prepare(recipe.data, models.processing(recipe.model, "causal"), 0)
    part = cells.within_training(whole)
    seen = [tuple(row) for row in [*part.train["input_ids"], *part.held_out["input_ids"]]]
    assert sorted(seen) == sorted(map(tuple, whole.train["input_ids"]))
    assert not set(seen) & set(map(tuple, whole.held_out["input_ids"]))


def test_seconds_become_steps_by_a_probe_and_a_crash_is_told(folder, tmp_path, monkeypatch):
    asked = []

    class Worker(running._Worker):
        def run(self, file):
            told = json.loads(file.read_text())
            asked.append((file.parent.name, told["recipe"]["training"]["steps"], told["validation"]))
            if file.parent.name == "seed-0":
                return -signal.SIGKILL
            result = {"cell": told, "step_seconds": 0.5}
            (file.parent / "result.json").write_text(json.dumps(result))
            return 0

    monkeypatch.setattr(running, "_Worker", Worker)
    recipe = recipes.load(folder / "recipe.yaml")
    found = compare(recipe, ["lora"], tmp_path / "out", seeds=2, budget=Budget.read("seconds=10"))
    assert asked == [("probe", running.PROBE, True), ("seed-0", 20, False), ("seed-1", 20, False)]
    assert found.outcomes[0].failures == {"seed 0": "its process was ended by SIGKILL, as for want of memory"}
    assert list(found.outcomes[0].results) == [1]


# --- who takes part


def test_methods_take_the_recipes_options(folder):
    recipe = recipes.load(folder / "recipe.yaml", ["method={LoRA: {rank: 4, where: attention.q}}"])
    found = contenders(recipe, ["lora", "qlora", "dora", "parallel", "IA3"], {}, {"ia3": 0.5})
    assert [one.quantization for one in found] == [None, "nf4", None, None, None]
    for one in found[:3]:
        assert one.options["rank"] == 4
        assert one.options["where"] == "attention.q"
    assert found[3].options == {"width": 512, "placement": "parallel", "scaling": 4.0, "where": "mlp"}
    assert found[4].learning_rate == 0.5
    swept = contenders(recipe, ["lora", "ia3"], sweeps(["rank=2,4", "where=attention,mlp"]), {})
    assert [one.name for one in swept] == [
        "lora rank=2 where=attention", "lora rank=2 where=mlp", "lora rank=4 where=attention", "lora rank=4 where=mlp",
        "ia3 where=attention", "ia3 where=mlp",
    ]  # fmt: skip
    assert swept[0].options["rank"] == 2
    assert len({one.folder for one in swept}) == len(swept)


def test_rates_of_a_search_lie_around_the_middle():
    assert Search(3).around(3e-3) == [1e-3, 3e-3, 9e-3]
    assert learning_rates("lora=2e-3, full=1e-4") == {"lora": 2e-3, "full": 1e-4}


# --- statistics


def test_the_interval_of_one_seed_is_students():
    x = np.array([[0.0, 1.0, 1.0, 0.0, 1.0]])
    low, high = stats.t.interval(0.95, 4, loc=x.mean(), scale=stats.sem(x[0]))
    found = statistics.interval(x)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert statistics.interval(x - x).half == 0.0
    assert not found.clear


def test_intervals_hold_what_they_promise():
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        seeds, examples = chance.normal(0, 0.3, (4, 1)), chance.normal(0, 1, (1, 60))
        found = statistics.interval(0.7 + seeds + examples + chance.normal(0, 1, (4, 60)))
        held += abs(found.mean - 0.7) <= found.half
    assert 0.92 <= held / 400 <= 0.99
    shared = chance.normal(0, 5, (1, 60))
    one, other = (shared + shift + chance.normal(0, 0.1, (3, 60)) for shift in (0.0, 0.2))
    assert statistics.interval(other - one).clear
    assert not statistics.interval(other).clear


def test_a_ratio_is_of_sums():
    x = statistics.ratios([[2.0, 9.0], [4.0, 3.0]], [[1.0, 3.0], [1.0, 3.0]])
    assert x.mean() == pytest.approx(18 / 8)
    assert statistics.ratios([[1.0, 0.0]], [[1.0, 1.0]]).tolist() == [[1.0, 0.0]]


# --- the report


class Page(HTMLParser):
    """Tags with their attributes, and the text of the embedded data."""

    def __init__(self):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("type") == "application/json"

    def handle_data(self, data):
        if self.inside:
            self.data += data

    def handle_endtag(self, tag):
        self.inside = False


def test_the_page_is_whole_and_loads_nothing(compared, found):
    output, _ = compared
    page = Page()
    page.feed((output / "comparison.html").read_text(encoding="utf-8"))
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset"} & attrs.keys()]
    assert sum(tag == "svg" for tag, _ in page.tags) == 6  # four frontiers, memory, curves
    data = json.loads(page.data)
    assert [one["name"] for one in data["methods"]] == ["lora", "adapter"]
    assert len(data["texts"]) == 12
    assert data["texts"][0].startswith("</script><b>")
    assert data == json.loads(json.dumps(data))
    assert "<b>bad" not in (output / "comparison.html").read_text(encoding="utf-8").replace("<\\/script><b>bad", "")
    assert len(list(csv.DictReader((output / "comparison.csv").read_text(encoding="utf-8").splitlines()))) == 2
    assert "| lora |" in (output / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_shows_the_examples(compared, found):
    page = (compared[0] / "comparison.html").as_uri()
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    one, other = (np.array(method["scores"]) for method in found["methods"])
    assert f"lora better than adapter: {int((one > other).sum())}" in done.stdout
    assert f"adapter better than lora: {int((other > one).sum())}" in done.stdout
    assert f"{int((one == other).sum())} of 12 are alike." in done.stdout


def test_columns_in_which_nothing_stands_are_left_out(found):
    """The tiny BERT decodes nothing and predicts no tokens."""
    text = summary.markdown(found)
    assert "| method | form | batch | prefill ms | of base | tokens/s |" in text
    assert "| method | drift of embeddings |" in text
    assert "decode ms" not in report.html(found)
    assert summary.filled(["a", "b"], []) == ([], [])


def test_the_frontier_holds_what_no_other_beats():
    points = [charts.Point(name, x, y, 0.1, 0) for name, x, y in (("a", 1, 3), ("b", 2, 2), ("c", 3, 5), ("d", 3, 4))]
    assert [point.name for point in charts.frontier(points, higher=True)] == ["a", "c"]
    assert [point.name for point in charts.frontier(points, higher=False)] == ["a", "b"]


# --- mistakes


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--methods", "lroa"], "'lroa' is no method. Closest: lora"),
        (["--methods", "lora,LoRA"], "'lora' is named twice among the methods. Name it once."),
        (["--budget", "hours=3"], "'hours=3' is no budget. Write one of: tokens=N, seconds=N, steps=N."),
        (["--budget", "steps=0"], "'steps=0' is no budget."),
        (["--search", "rank", "3"], "'rank' cannot be searched for; only learning_rate can. Sweep other options."),
        (["--search", "learning_rate", "1"], "A search among 1 learning rates chooses nothing."),
        (["--sweep", "rank=4"], "'rank=4' is no sweep of an option over values, such as rank=4,8,16."),
        (["--methods", "prefix", "--sweep", "rank=4,8"], "No compared method has the option rank of the sweep."),
        (["--base", "dora", "--methods", "lora,full"], "The base method 'dora' is not among lora, full."),
        (["--rates", "vera=1"], "A learning rate is given for vera, which is not compared. Leave it out."),
        (["--rates", "lora=fast"], "'lora=fast' is no learning rate of a method, such as lora=2e-3."),
        (["--rates", "lora=-1"], "'lora=-1': a learning rate is above zero."),
        (["data.held_out=0"], "Methods are compared on held-out rows."),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, told, message):
    code, out, err = command(
        monkeypatch, capsys, "compare", folder / "recipe.yaml", *told, "--output", tmp_path / "out"
    )
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.rglob("result.json"))


def test_streams_are_refused(folder, tmp_path):
    recipe = recipes.load(folder / "recipe.yaml", ["data.streaming=true", "training.steps=2"])
    with pytest.raises(RecipeError, match=r"Set data\.streaming to false"):
        compare(recipe, ["lora"], Path(tmp_path))
