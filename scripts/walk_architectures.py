"""Try Veneer on a tiny model of every architecture in transformers, and write docs/architectures.md and .json.

    python scripts/walk_architectures.py                   # all of them, two at a time: about a quarter of an hour
    python scripts/walk_architectures.py llama mixtral     # these, printed

Each architecture runs in a process of its own, with a limit of time and memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch  # noqa: E402
from architectures import build, kind, types  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import veneer  # noqa: E402
from veneer import places  # noqa: E402
from veneer.seams import anatomy, probe  # noqa: E402

METHODS: dict[str, tuple[veneer.Method, str]] = {
    "LoRA": (veneer.LoRA(rank=2), "linear"),
    "BottleneckAdapter": (veneer.BottleneckAdapter(width=2, activation="tanh"), "block"),
    "PrefixTuning": (veneer.PrefixTuning(length=2), "re:.*"),
}
FLOORS = {
    "LoRA attached": 550,
    "LoRA": 450,
    "BottleneckAdapter": 430,
    "BottleneckAdapter, text": 166,
    "PrefixTuning": 361,
}
TEXT = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
SECONDS, BYTES, AT_ONCE = 60, 16 << 30, 2
Result = dict[str, Any]


def try_one(model_type: str) -> Result:
    """Everything that is asked of one architecture; a step that fails leaves its reason."""
    found: Result = {}
    try:
        found["class"], found["head"] = kind(model_type)[0].__name__, kind(model_type)[1]
        model = build(model_type).requires_grad_(False)  # torch takes other kernels for what is trained
    except Exception as error:
        return {**found, "not built": reason(error)}
    batch, base, failures = None, [], []
    for batch in probe.candidates(model):
        try:
            with torch.no_grad():
                base = answers(model, batch)
        except Exception as error:
            failures.append(reason(error))
            batch = None
        else:
            break
    if batch is None:
        found["not run"] = next(iter(failures), "no input could be guessed")
    try:
        found |= structure(model)
    except veneer.VeneerError as error:
        found["not read"] = reason(error)
    for name, (method, where) in METHODS.items():
        found[name] = try_method(model, method, where, batch, base)
    return found


def structure(model: nn.Module) -> Result:
    """The roles and sublayers that the anatomy shows."""
    read = anatomy.read(model)
    kinds = [sublayer.kind for sublayer in read.sublayers]
    roles = {
        f"{sublayer.kind}.{role}" for sublayer in read.sublayers for role, parts in sublayer.roles.items() if parts
    }
    for role in ("embedding", "head"):
        with contextlib.suppress(veneer.VeneerError):
            roles |= {role} if places.find(model, role, "parameter") else set()
    registered = sum(sublayer.registered for sublayer in read.sublayers)
    return {"roles": sorted(roles), "sublayers": {k: kinds.count(k) for k in sorted(set(kinds))}, "keys": registered}


def try_method(model: nn.Module, method: veneer.Method, where: str, batch: Any, base: list[Tensor]) -> Result:
    """Attach, see that a start of nothing changes nothing, then that every parameter gets a gradient."""
    try:
        adapter = veneer.attach(model, method, where)
    except veneer.VeneerError as error:
        return {"refused": reason(error)}
    found: Result = {"places": len(adapter.claims)}
    try:
        if batch:
            if not isinstance(method, veneer.PrefixTuning):
                with torch.no_grad():
                    now = answers(model, batch)
                found["identity"] = all(
                    torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(base, now, strict=True)
                )
            unreached = set(veneer.check(model, {**batch, **without_cache(model)}))
            torch.manual_seed(1)
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.1)
            trained = [answer for answer in answers(model, batch) if answer.requires_grad]
            losses = [(answer * torch.randn_like(answer)).mean() for answer in trained]
            torch.stack(losses).sum().backward()
            reached = [one for one in adapter.claims if one.place.path not in unreached]
            grads = {f"{one.place.path}.{name}": p.grad for one in reached for name, p in one.delta.named_parameters()}
            missing = [name for name, grad in grads.items() if grad is None or not grad.nan_to_num(nan=0.0).any()]
            found |= {"not reached": len(unreached), "parameters": len(grads), "without gradient": len(missing)}
            if missing:
                found["first without"] = missing[0]
    except Exception as error:
        found["failed"] = reason(error)
    finally:
        veneer.detach(model, adapter)
    return found


def answers(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Every tensor of numbers that a forward returns, with the same draws each time."""
    torch.manual_seed(0)
    output = model(**batch, **without_cache(model))
    output = {k: v for k, v in output.items() if "past" not in k} if isinstance(output, dict) else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a forward from returning its keys and values."""
    return {"use_cache": False} if probe.accepts(model, "use_cache") else {}


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@dataclass
class Child:
    """One architecture, in a process of its own."""

    name: str
    pid: int
    pipe: int
    until: float


def walk(names: list[str], done: Callable[[str, Result], None] = lambda name, result: None) -> dict[str, Result]:
    """The results of these architectures, a few processes at a time."""
    waiting, running = list(names), dict[int, Child]()
    found: dict[str, Result] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            child = _start(waiting.pop(0))
            running[child.pipe] = child
        ready = select.select(list(running), [], [], 1.0)[0]
        late = [child.pipe for child in running.values() if time.monotonic() > child.until]
        for pipe in {*ready, *late}:
            child = running.pop(pipe)
            if pipe in ready:
                with os.fdopen(pipe) as text:
                    written = text.read()
                found[child.name] = json.loads(written) if written else {"not built": "out of memory or time"}
            else:
                os.kill(child.pid, signal.SIGKILL)
                os.close(pipe)
                found[child.name] = {"not built": "out of time"}
            os.waitpid(child.pid, 0)
            done(child.name, found[child.name])
    return {name: found[name] for name in names}


def _start(name: str) -> Child:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(name, pid, reader, time.monotonic() + 5 * SECONDS)
    try:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        warnings.filterwarnings("ignore")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.write(writer, json.dumps(try_one(name)).encode())
    except Exception as error:
        os.write(writer, json.dumps({"not built": reason(error)}).encode())
    finally:
        os._exit(0)


def works(result: Result, name: str) -> bool:
    """Whether a method trains every parameter it put on an architecture."""
    one = result.get(name, {})
    return one.get("parameters", 0) > 0 and one["without gradient"] == 0 and one.get("identity", True)


def counts(results: dict[str, Result]) -> dict[str, int]:
    """What docs/architectures.md states."""
    every = list(results.values())
    text = [result for result in every if result.get("head") in TEXT]
    return {
        "types": len(every),
        "built": sum("not built" not in result for result in every),
        "ran": sum("not built" not in result and "not run" not in result for result in every),
        "read": sum("roles" in result for result in every),
        "attention by transformers' interface": sum(bool(result.get("keys")) for result in every),
        "text": sum("roles" in result for result in text),
        "LoRA attached": sum("places" in result.get("LoRA", {}) for result in every),
        **{name: sum(works(result, name) for result in every) for name in METHODS},
        "BottleneckAdapter, text": sum(works(result, "BottleneckAdapter") for result in text),
    }


def page(results: dict[str, Result]) -> str:
    """docs/architectures.md."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: dict[str, Result]) -> Iterator[str]:
    import transformers

    number = counts(results)
    yield "# Architectures"
    yield ""
    yield "<!-- Written by scripts/walk_architectures.py; the numbers behind it are in architectures.json. -->"
    yield ""
    yield f"What was tried on a tiny random model of every model type in transformers {transformers.__version__}"
    yield "that has an auto class. Nothing in Veneer knows any of them by name."
    yield ""
    yield "| what | model types |"
    yield "|---|---:|"
    for name, count in number.items():
        yield f"| {MEANINGS[name]} | {count} |"
    yield ""
    yield "`all`: every parameter of the adapter got a gradient, and at its start it changed nothing; `3/8`: 3 of 8."
    yield "`attached`: no input could be guessed for a forward. `-`: there is no such place. `failed`: an error, named"
    yield "in architectures.json. Places that the guessed input does not reach are left out: of a model that is given"
    yield "text, the tower for images."
    yield ""
    yield f"| model type | roles | {' | '.join(METHODS)} |"
    yield f"|---|---|{'---|' * len(METHODS)}"
    for name, result in results.items():
        if "not built" not in result:
            cells = [_cell(result, method) for method in METHODS]
            yield f"| {name} | {_roles(result)} | {' | '.join(cells)} |"
    yield ""
    yield "## Not built"
    yield ""
    yield "Their default config cannot be made tiny by rule, or they need a library that is not installed."
    yield ""
    yield ", ".join(f"{name}" for name, result in results.items() if "not built" in result) + "."


MEANINGS = {
    "types": "with an auto class",
    "built": "built tiny",
    "ran": "of these, ran a forward on a guessed input",
    "read": "anatomy read",
    "attention by transformers' interface": "attend through transformers' interface",
    "text": "anatomy read, of causal and sequence-to-sequence language models",
    "LoRA attached": "LoRA on `linear` attaches",
    "LoRA": "LoRA on `linear` gets a gradient in every parameter",
    "BottleneckAdapter": "a bottleneck adapter in every sublayer gets a gradient in every parameter",
    "BottleneckAdapter, text": "bottleneck adapters likewise, of causal and sequence-to-sequence language models alone",
    "PrefixTuning": "a prefix in every attention that keys can stand in front of gets a gradient in every parameter",
}
LETTERS = {"attention": "qkvo", "cross_attention": "qkvo", "mlp": ("gate", "up", "down")}


def _roles(result: Result) -> str:
    if "not read" in result:
        return "not read"
    shown = []
    for kind_, shorts in LETTERS.items():
        here = [short for short in shorts if f"{kind_}.{short}" in result.get("roles", [])]
        if here:
            shown.append(f"{kind_.replace('_', ' ')} {('' if len(here[0]) == 1 else ' ').join(here)}")
    shown += [name for name in ("mixer", "embedding", "head") if any(r.startswith(name) for r in result["roles"])]
    return ", ".join(shown)


def _cell(result: Result, method: str) -> str:
    one = result[method]
    if "refused" in one:
        return "-"
    if "failed" in one:
        return "failed"
    if "parameters" not in one:
        return "attached"
    if works(result, method):
        return "all"
    return f"{one['parameters'] - one['without gradient']}/{one['parameters']}"


def write(results: dict[str, Result]) -> None:
    """Both files in docs/."""
    everything = {"counts": counts(results), "results": results}
    (ROOT / "docs" / "architectures.json").write_text(json.dumps(everything, separators=(",", ":")) + "\n")
    (ROOT / "docs" / "architectures.md").write_text(page(results))


def main() -> None:
    """Walk over all architectures, or those named."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    torch.set_num_threads(1)
    try_one("llama")  # what every architecture imports is imported once, before the processes part
    names = sys.argv[1:] or types()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("architectures", total=len(names))
        results = walk(names, lambda name, _: progress.update(task, advance=1, description=name))
    if sys.argv[1:]:
        print(json.dumps(results, indent=1))
        return
    write(results)
    print(json.dumps(counts(results), indent=1))


if __name__ == "__main__":
    main()
