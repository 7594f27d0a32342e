"""What came of a comparison as one mapping, a table, and the files comparison.json, .csv, .md and .html."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Group
from rich.table import Table

from veneer.compare import report
from veneer.compare.running import Comparison, Outcome
from veneer.compare.scoring import HIGHER, QUALITY
from veneer.compare.statistics import LEVEL, Interval, interval, ratios
from veneer.samples import whole

MIB = 2**20


def write(comparison: Comparison) -> dict[str, Any]:
    """The mapping of `of`, after writing it in every form into the comparison's folder."""
    found = of(comparison)
    texts = {
        "comparison.json": json.dumps(found, ensure_ascii=False) + "\n",
        "comparison.csv": table_csv(found),
        "comparison.md": markdown(found),
        "comparison.html": report.html(found),
    }
    for name, text in texts.items():
        whole.replace(comparison.folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return found


def of(comparison: Comparison) -> dict[str, Any]:
    """All figures: what was asked, the held-out examples, and for each method its own or why there are none."""
    done = [result for outcome in comparison.outcomes for result in outcome.results.values()]
    first = done[0] if done else None
    task = first["task"] if first else ""
    quality = QUALITY.get(task, "loss")
    base = next(outcome for outcome in comparison.outcomes if outcome.contender.name == comparison.base)
    recipe = comparison.recipe.as_dict()
    return {
        "model": recipe["model"]["name"],
        "data": recipe["data"],
        "training": recipe["training"],
        "task": task,
        "quality": quality,
        "higher_is_better": quality in HIGHER,
        "level": LEVEL,
        "base": comparison.base,
        "seeds": comparison.seeds,
        "budget": str(comparison.budget) if comparison.budget else "the recipe's own",
        "search": comparison.search.rates if comparison.search else None,
        "device": first["device"] if first else "",
        "versions": first["versions"] if first else {},
        "before": first["before"] if first else {},
        "examples": {name: first["examples"][name] for name in ("texts", "truths")} if first else {},
        "methods": [_method(outcome, base) for outcome in comparison.outcomes],
    }


def _method(outcome: Outcome, base: Outcome) -> dict[str, Any]:
    one, results = outcome.contender, outcome.results
    found: dict[str, Any] = {
        "name": one.name,
        "method": one.method,
        "options": dict(one.options),
        "quantization": one.quantization,
        "failures": outcome.failures,
        "searched": {f"{rate:g}": loss for rate, loss in outcome.searched.items()},
        "seeds": sorted(results),
    }
    if not results:
        return found
    runs = list(results.values())
    x = _scores(runs)
    found["quality"] = _plain(interval(x))
    both = sorted(results.keys() & base.results.keys())
    if outcome is not base and both:
        mine, other = ([side.results[seed] for seed in both] for side in (outcome, base))
        found["difference"] = _plain(interval(_scores(mine) - _scores(other)))
    for name in ("peak_bytes", "start_bytes", "step_seconds", "tokens_per_second", "training_seconds", "tokens"):
        found[name] = mean(run[name] for run in runs)
    predicted = runs[0]["predicted"]
    if isinstance(predicted, str):
        found["not_predicted"] = predicted
    else:
        found["predicted"] = {name: mean(run["predicted"][name] for run in runs) for name in predicted}
        found["predicted_bytes"] = sum(found["predicted"].values())
    for name in ("trainable", "total", "steps", "adapter_bytes", "learning_rate", "micro_batch_size"):
        found[name] = runs[0][name]
    found["metrics"] = {name: mean(run["metrics"][name] for run in runs) for name in runs[0]["metrics"]}
    found["inference"] = next((run["inference"] for run in runs if "inference" in run), {})
    forgotten = [run["forgetting"] for run in runs]
    found["forgetting"] = {
        name: value if isinstance(value, str) else mean(each[name] for each in forgotten)
        for name, value in forgotten[0].items()
    }
    found["curves"] = [run["curve"] for run in runs]
    sums = [run["examples"] for run in runs]
    found["scores"] = [
        round(mean(each["values"][row] / max(each["weights"][row], 1) for each in sums), 4) for row in range(x.shape[1])
    ]
    found["answers"] = sums[0]["answers"] if any(sums[0]["answers"]) else []
    found["written"] = runs[0]["written"]
    return found


def _scores(runs: Sequence[Mapping[str, Any]]) -> Any:
    return ratios([run["examples"]["values"] for run in runs], [run["examples"]["weights"] for run in runs])


def _plain(found: Interval) -> dict[str, Any]:
    return {"mean": found.mean, "half": found.half, "clear": found.clear}


# --- in rows

TRAINED = ("method", "quality", "difference", "seeds", "learning rate", "trainable", "share")
COSTS = ("method", "peak MiB", "predicted MiB", "off by", "before MiB", "step ms", "tokens/s", "adapter kB")
INFERENCE = ("method", "form", "batch", "prefill ms", "of base", "decode ms", "of base", "tokens/s")


def trained_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row of TRAINED for each method; of one that failed, its reason. The share is of the base's parameters."""
    rows = []
    for one in found["methods"]:
        if "quality" not in one:
            rows.append([one["name"], f"failed: {next(iter(one['failures'].values()))}", "", "", "", "", ""])
            continue
        rows.append([
            one["name"],
            plus_minus(one["quality"]),
            plus_minus(one["difference"], sign="+") if "difference" in one else "",
            str(len(one["seeds"])),
            f"{one['learning_rate']:g}",
            f"{one['trainable']:,}",
            f"{100 * one['trainable'] / (one['total'] - one['trainable']):.2f}%",
        ])  # fmt: skip
    return rows


def cost_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row of COSTS for each method that was trained."""
    return [
        [
            one["name"],
            f"{one['peak_bytes'] / MIB:,.0f}",
            *_predicted(one),
            f"{one['start_bytes'] / MIB:,.0f}",
            f"{1000 * one['step_seconds']:,.0f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['adapter_bytes'] / 1000:,.0f}",
        ]
        for one in found["methods"]
        if "quality" in one
    ]


def _predicted(one: Mapping[str, Any]) -> tuple[str, str]:
    if "predicted_bytes" not in one:
        return "not planned", ""
    expected = one["predicted_bytes"]
    return f"{expected / MIB:,.0f}", f"{expected / one['peak_bytes'] - 1:+.0%}"


def inference_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row of INFERENCE for each method, form and batch."""
    rows = []
    for one in found["methods"]:
        for form in ("unmerged", "merged"):
            for batch, figures in one.get("inference", {}).get(form, {}).items():
                row = [one["name"], form, batch]
                for name in ("prefill", "decode"):
                    times = figures.get(name)
                    row += [f"{1000 * times['adapted']:,.1f}", f"{times['ratio']:.2f}"] if times else ["", ""]
                rows.append([*row, f"{figures.get('decode', figures['prefill'])['tokens_per_second']:,.0f}"])
        if "not_merged" in one.get("inference", {}):
            rows.append([one["name"], "merged", "none: it has no merged form", "", "", "", "", ""])
    return rows


FORGETTING = ("method", "before", "after", "more", "drift of embeddings")


def forgetting_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row of FORGETTING for each method that was measured."""
    rows = []
    for one in found["methods"]:
        figures = one.get("forgetting", {})
        if "before" in figures:
            more = figures["after"] - figures["before"]
            rows.append([one["name"], f"{figures['before']:.3f}", f"{figures['after']:.3f}", f"{more:+.3f}", ""])
        elif "drift" in figures:
            rows.append([one["name"], "", "", "", f"{figures['drift']:.4f}"])
    return rows


def plus_minus(found: Mapping[str, Any], sign: str = "") -> str:
    """A mean and its interval, with digits that fit the interval."""
    half = found["half"]
    digits = 4 if half < 0.01 else 3
    return f"{found['mean']:{sign}.{digits}f} ± {half:.{digits}f}"


def table(found: Mapping[str, Any]) -> Group:
    """For the terminal."""
    shown = []
    for title, heads, rows in _tables(found):
        one = Table(*heads, title=title, title_justify="left")
        for row in rows:
            one.add_row(*row)
        shown.append(one)
    return Group(*shown)


def markdown(found: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [f"# Methods on {found['data']['path']}, model {found['model']}", "", report.asked(found), ""]
    for title, heads, rows in _tables(found):
        lines += [f"## {title}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows] + [""]
    return "\n".join(lines)


def trained_heads(found: Mapping[str, Any]) -> list[str]:
    """TRAINED by the names of the quality and of the base method."""
    return ["method", found["quality"].replace("_", " "), f"against {found['base']}", *TRAINED[3:]]


def _tables(found: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    every = [
        ("Quality", trained_heads(found), trained_rows(found)),
        ("Cost of training", COSTS, cost_rows(found)),
        ("Inference, against the base in the same process", INFERENCE, inference_rows(found)),
        ("Forgetting of general text", FORGETTING, forgetting_rows(found)),
    ]
    return [(title, *filled(heads, rows)) for title, heads, rows in every if rows]


def filled(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns in which no row has anything: an encoder decodes nothing, one method has no other."""
    there = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return [heads[place] for place in there], [[row[place] for place in there] for row in rows]


def table_csv(found: Mapping[str, Any]) -> str:
    """One row a method, every figure in a column of its own, in SI units."""
    rows = [_flat(one) for one in found["methods"]]
    heads = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(one: Mapping[str, Any]) -> dict[str, Any]:
    left = ("curves", "scores", "answers", "written", "options", "searched", "failures", "inference", "seeds")
    row: dict[str, Any] = {}
    for name, value in one.items():
        if name in left:
            continue
        if isinstance(value, Mapping):
            row |= {f"{name}_{inner}": each for inner, each in value.items()}
        else:
            row[name] = value
    for form in ("unmerged", "merged"):
        for batch, figures in one.get("inference", {}).get(form, {}).items():
            for phase, times in figures.items():
                row |= {f"{form}_batch_{batch}_{phase}_{what}": value for what, value in times.items()}
    row["seeds"] = len(one["seeds"])
    row["failure"] = "; ".join(f"{what}: {why}" for what, why in one["failures"].items())
    return row
