"""comparison.html: one page that loads nothing, with tables, charts, and the held-out examples side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from veneer.compare import charts, summary

COSTS = {
    "trainable": "trainable parameters",
    "peak_bytes": "peak memory in bytes",
    "step_seconds": "seconds a step",
    "adapter_bytes": "bytes of the adapter's file",
}
"""figure -> how the axis of the frontier calls it."""


def asked(found: Mapping[str, Any]) -> str:
    """In one sentence or two, what was run."""
    seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    steps = sorted({one["steps"] for one in found["methods"] if "steps" in one})
    said = f"{seeds}, {_span(steps)} steps of {found['training']['batch_size']} examples"
    budget = f"budget: {found['budget']}"
    rates = f"learning rates searched among {found['search']} each" if found["search"] else "learning rates as given"
    held = f"{len(found['examples'].get('texts', []))} held-out examples"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{said}; {budget}; {rates}; {held}. On {found['device'] or 'no device'} with {versions or 'no result'}."


def _span(steps: Sequence[int]) -> str:
    return "no" if not steps else str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def html(found: Mapping[str, Any]) -> str:
    """The whole page."""
    title = f"Methods on {_names(found['data']['path'])}, model {found['model']}"
    done = [one for one in found["methods"] if "quality" in one]
    sections = [_training(found)]
    if done:
        sections += [_frontier(found, done), _memory(done), _curves(done), _inference(found), _forgetting(found)]
        sections += [_examples(found, done)]
    sections += [_failures(found), _notes(found)]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(asked(found))}</p>\n{body}\n</main></body></html>\n"
    )


def _names(path: str | Sequence[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads, rows = summary.filled(heads, rows)
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    inner = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{inner}</tbody></table></div>'


def _training(found: Mapping[str, Any]) -> str:
    heads = summary.trained_heads(found)
    better = "Higher" if found["higher_is_better"] else "Lower"
    return (
        f"<section><h2>Quality</h2>{_table(heads, summary.trained_rows(found))}"
        f"<p class='note'>{better} {escape(heads[1])} is better. ± is half of a {100 * found['level']:.0f}% confidence "
        "interval over seeds and held-out examples; differences are of the same seeds and examples, pair by pair.</p>"
        f"<h2>Cost of training</h2>{_table(summary.COSTS, summary.cost_rows(found))}"
        "<p class='note'>Peak memory of the run's own process; predicted: by <code>veneer plan</code>, on top of what "
        "it had before a model was loaded.</p>"
        "</section>"
    )


def _frontier(found: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    numbers = _numbers(found)
    choices, shown = [], []
    quality = found["quality"].replace("_", " ")
    for place, (cost, across) in enumerate(COSTS.items()):
        points = [
            charts.Point(one["name"], one[cost], one["quality"]["mean"], one["quality"]["half"], numbers[one["name"]])
            for one in done
        ]
        drawn = charts.scatter(points, f"{across} (log scale)", quality, found["higher_is_better"])
        checked = " checked" if place == 0 else ""
        choices.append(f'<input type="radio" name="cost" id="cost{place}"{checked}>'
                       f'<label for="cost{place}">{across}</label>')  # fmt: skip
        shown.append(f'<div class="choice">{drawn}</div>')
    return (
        "<section><h2>Quality against cost</h2><p class='note'>The line joins the methods that no other beats at their "
        "cost or less; where intervals overlap, it says little.</p>"
        f"<div class='choices'>{''.join(choices)}{''.join(shown)}</div></section>"
    )


def _numbers(found: Mapping[str, Any]) -> dict[str, int]:
    return {one["name"]: number for number, one in enumerate(found["methods"])}


MEMORY = (
    ("before a model was loaded", ("before",)),
    ("measured: all beyond it", ()),
    ("predicted: weights", ("weights",)),
    ("predicted: adapter, gradients, optimizer", ("adapter", "gradients", "optimizer")),
    ("predicted: activations, logits, dense copies", ("activations", "logits", "dequantization")),
    ("predicted: kept by malloc", ("kept by malloc",)),
)
"""What a bar of the memory chart is made of, and which parts of a plan that is."""


def _memory(done: Sequence[Mapping[str, Any]]) -> str:
    kinds = [kind for kind, _ in MEMORY]
    rows = []
    for one in done:
        start, peak = one["start_bytes"] / summary.MIB, one["peak_bytes"] / summary.MIB
        rows.append((one["name"], [(kinds[0], min(start, peak)), (kinds[1], max(peak - start, 0.0))]))
        if planned := one.get("predicted"):
            sizes = [
                (kind, sum(planned.get(name, 0) for name in names) / summary.MIB) for kind, names in MEMORY if names
            ]
            rows.append((one["name"], sizes))
    why = {one["not_predicted"] for one in done if "not_predicted" in one}
    missing = "".join(f" Not predicted: {escape(reason)}" for reason in sorted(why))
    return (
        "<section><h2>Memory predicted against measured</h2><p class='note'>The peak of each method's runs above, what "
        f"<code>veneer plan</code> says of the highest moment of a step below.{missing}</p>"
        f"{charts.bars(rows, kinds, 'MiB')}</section>"
    )


def _curves(done: Sequence[Mapping[str, Any]]) -> str:
    found = [
        charts.Line(one["name"], curve["held_out"], number)
        for number, one in enumerate(done)
        for curve in one["curves"]
        if len(curve["held_out"]) > 1
    ]
    if not found:
        return ""
    return (
        "<section><h2>Learning curves</h2><p class='note'>Held-out loss, one line a seed.</p>"
        f"{charts.lines(found, 'optimizer step', 'held-out loss (nats)')}</section>"
    )


def _inference(found: Mapping[str, Any]) -> str:
    return f"<section><h2>Inference</h2>{_table(summary.INFERENCE, summary.inference_rows(found))}</section>"


def _forgetting(found: Mapping[str, Any]) -> str:
    rows = summary.forgetting_rows(found)
    return f"<section><h2>Forgetting</h2>{_table(summary.FORGETTING, rows)}</section>" if rows else ""


def _examples(found: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    data = {
        "texts": found["examples"]["texts"],
        "truths": found["examples"]["truths"],
        "higher": found["higher_is_better"],
        "methods": [{name: one[name] for name in ("name", "scores", "answers")} for one in done],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    options = "".join(f'<option value="{n}">{escape(one["name"])}</option>' for n, one in enumerate(done))
    second = options.replace('value="1"', 'value="1" selected', 1)
    return (
        "<section><h2>Example by example</h2><p>Held-out examples on which "
        f'<select id="one">{options}</select> does better than <select id="other">{second}</select>, and the other way '
        f'round, the largest differences first. <span id="tally"></span></p>'
        '<div class="sides"><div id="first"></div><div id="second"></div></div>'
        f'<script type="application/json" id="data">{text}</script><script>{SCRIPT}</script></section>'
    )


def _failures(found: Mapping[str, Any]) -> str:
    rows = [[one["name"], what, why] for one in found["methods"] for what, why in one["failures"].items()]
    return f"<section><h2>What failed</h2>{_table(('method', 'run', 'reason'), rows)}</section>" if rows else ""


def _notes(found: Mapping[str, Any]) -> str:
    return (
        "<section><h2>How the figures are made</h2><ul>"
        "<li>Intervals: two-way analysis of variance of seeds and examples, both random; t with Satterthwaite's "
        "degrees of freedom. With one seed the examples' alone. They are not corrected for the number of methods.</li>"
        "<li>Peak memory: of the run's own process, or of the GPU; what it had before a model was loaded stands beside "
        "it. Predicted: that, and what a plan of the longest batch counts, without weights, at the highest moment of a "
        "step. Loading, what libraries take for themselves, and what was freed and not given back are left out.</li>"
        "<li>Step time: the median of all optimizer steps but the first. Tokens a second: without padding, over the "
        "seconds of the steps.</li>"
        "<li>Inference: base and adapted model take turns in one process; 'of base' is the median of the ratios of the "
        "turns. Above 1 the adapted model is slower.</li>"
        "<li>Forgetting: the loss of a token of general text, the adapter aside and in place; of encoders, 1 - cosine "
        "between the text's embeddings before and after.</li></ul>"
        f"<details><summary>The recipe</summary><pre>{escape(json.dumps(_told(found), indent=1))}</pre></details>"
        "</section>"
    )


def _told(found: Mapping[str, Any]) -> dict[str, Any]:
    methods = {
        one["name"]: {name: one[name] for name in ("method", "options", "quantization", "searched")}
        for one in found["methods"]
    }
    return {name: found[name] for name in ("model", "data", "training", "budget")} | {"methods": methods}


STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;margin:0;color:#1c2430;background:#f5f6f8}
main{max-width:1060px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:8px 0}h2{font-size:18px;margin:0 0 8px}
section{background:#fff;border:1px solid #e1e5ea;border-radius:8px;padding:18px 20px;margin:18px 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:4px 9px;text-align:right;border-bottom:1px solid #edf0f3;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:#f7f9fb;font-weight:600;vertical-align:bottom;white-space:normal}
.note{color:#5b6673;font-size:13px}
svg{width:100%;height:auto;font:12px system-ui,sans-serif;display:block}
svg .grid{stroke:#e6e9ed}svg .tick{fill:#6a7480;font-size:11px}svg .label{fill:#3a4450}
svg .frontier{fill:none;stroke:#9aa4af;stroke-width:2;stroke-dasharray:5 4}
svg .leader{stroke-opacity:.25;fill:none}svg .curve{fill:none;stroke-width:1.6;stroke-opacity:.8}
.choices input{position:absolute;opacity:0}
.choices label{display:inline-block;padding:3px 11px;margin:0 6px 8px 0;border:1px solid #cfd6dd;border-radius:14px;
font-size:13px;cursor:pointer}
.choices input:checked+label{background:#1c5d99;color:#fff;border-color:#1c5d99}
.choices input:focus-visible+label{outline:2px solid #1c5d99}
.choice{display:none}
#cost0:checked~.choice:nth-of-type(1),#cost1:checked~.choice:nth-of-type(2),#cost2:checked~.choice:nth-of-type(3),
#cost3:checked~.choice:nth-of-type(4){display:block}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:18px}.sides h3{font-size:14px;margin:6px 0}
.one{border-left:3px solid #cfd6dd;padding:3px 10px;margin:7px 0;font-size:13px}.one b{font-weight:600}
.one small{color:#5b6673}pre{font-size:12px;overflow:auto}
@media(max-width:700px){.sides{grid-template-columns:1fr}main{padding:10px}}
"""

SCRIPT = """
(function(){
const data=JSON.parse(document.getElementById('data').textContent),most=40;
const by=id=>document.getElementById(id);
function text(parent,tag,value){const one=document.createElement(tag);one.textContent=value;parent.append(one);
  return one}
function show(place,winner,loser,rows){
  place.replaceChildren();
  text(place,'h3',winner.name+' better than '+loser.name+': '+rows.length);
  for(const row of rows.slice(0,most)){
    const box=text(place,'div','');box.className='one';
    text(box,'div',data.texts[row]);
    const line=text(box,'small','');
    line.append('truth: '+data.truths[row]+' · ');
    for(const one of [winner,loser])
      line.append(one.name+': '+(one.answers.length?one.answers[row]+' ':'')+'('+one.scores[row]+') ');
  }
  if(rows.length>most)text(place,'small','and '+(rows.length-most)+' more');
}
function update(){
  const one=data.methods[by('one').value],other=data.methods[by('other').value],sign=data.higher?1:-1;
  const gain=data.texts.map((_,row)=>sign*(one.scores[row]-other.scores[row]));
  const rows=gain.map((_,row)=>row);
  const better=rows.filter(row=>gain[row]>0).sort((a,b)=>gain[b]-gain[a]);
  const worse=rows.filter(row=>gain[row]<0).sort((a,b)=>gain[a]-gain[b]);
  show(by('first'),one,other,better);show(by('second'),other,one,worse);
  by('tally').textContent=(rows.length-better.length-worse.length)+' of '+rows.length+' are alike.';
}
by('one').onchange=by('other').onchange=update;update();
})();
"""
