"""Holds `veneer export --check` and what export writes to the code of the programs that take it; prints a table.

    python scripts/check_servers.py [--vllm SOURCES] [--sglang SOURCES] [--llama-cpp SOURCES] [--work FOLDER]

PEFT is checked in any case. SOURCES of vLLM and SGLang is a folder with a wheel of it unpacked (`pip download --no-deps
vllm==0.33.0`, then unzip); SOURCES of llama.cpp its sources (the sdist of llama-cpp-python has them), with `pip install
llama-cpp-python sentencepiece`. vLLM's and SGLang's small dependencies are worth installing (msgspec, pyzmq,
cbor2, cloudpickle, orjson, ...); what is missing is stood in for and named below the table. `server_*.py` say how far
each program's code runs on a CPU; `server_smollm2.py` has llama.cpp compute with a trained adapter on a real model.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import server_cases
import torch
from safetensors.torch import load_file

import veneer
from veneer.interop.servers import RANKS, Finding

HERE = Path(__file__).parent


def said(found: list[Finding]) -> str:
    """The gravest kind of finding, in a word."""
    return next((kind for kind in ("refused", "wrong", "setting") if any(one.kind == kind for one in found)), "taken")


def rank_of(found: list[Finding]) -> int:
    """The rank that a finding says to start vLLM with."""
    limits = [int(match[1]) for one in found if (match := re.search(r"--max-lora-rank (\d+)", one.way_out))]
    return max([16, *limits])


def settings(found: list[Finding]) -> list[tuple[int, bool]]:
    """How vLLM is started: as it is, then as the findings say, or with all it has where they say that nothing helps."""
    refused = any(one.kind == "refused" for one in found)
    experts = any("mixed-moe" in one.way_out for one in found)
    return list(dict.fromkeys([(16, False), (RANKS[-1] if refused else rank_of(found), experts or refused)]))


def heard(answers: list[dict[str, str]], changed: bool) -> str:
    """A server's answers in a word: setting, where it takes with one what it refuses without."""
    if answers[-1]["verdict"] == "wrong" and not changed:
        return "taken, not compared"
    return "setting" if len({one["verdict"] for one in answers}) > 1 else answers[-1]["verdict"]


def in_peft(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """What PEFT computes with each folder, beside what the adapted model gave."""
    answers = {}
    for case in cases:
        folder = Path(case["folder"])
        saved = load_file(folder / "logits.safetensors")
        try:
            model = peft.PeftModel.from_pretrained(server_cases.load(Path(case["base"])), folder / "adapter").eval()
            with torch.no_grad():
                apart = float((model(saved["ids"]).logits - saved["logits"]).abs().max() / saved["logits"].abs().max())
            answer = {"verdict": "taken" if apart < 1e-4 else "wrong", "why": f"{apart:.1e} apart"}
        except Exception as error:
            answer = {"verdict": "refused", "why": f"{type(error).__name__}: {error}"}
        answers[case["folder"]] = [answer]
    return answers


def told(server: str, sources: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """What the script for a server prints."""
    words = [sys.executable, str(HERE / f"server_{server}.py"), str(sources)]
    done = subprocess.run(words, input=json.dumps(cases), stdout=subprocess.PIPE, text=True, check=True)
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def unpacked(sources: Path, name: str) -> str:
    """The version of an unpacked wheel."""
    return next(sources.glob(f"{name}-*.dist-info")).name.removesuffix(".dist-info").partition("-")[2]


def main() -> None:
    """Make the cases, ask the servers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--vllm", "--sglang", "--llama-cpp", "--work"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp())
    server_cases.write(work)
    cases = [json.loads(file.read_text()) | {"folder": str(file.parent)} for file in work.glob("cases/*/case.json")]
    cases.sort(key=lambda case: [*server_cases.CASES].index(case["name"]))
    for case in cases:
        case["base"] = str(work / "bases" / case["base"])
    programs: list[tuple[str, str, Path | None]] = [("peft", version("peft"), None)]
    if given.vllm:
        programs.append(("vllm", unpacked(given.vllm, "vllm"), given.vllm))
    if given.sglang:
        programs.append(("sglang", unpacked(given.sglang, "sglang"), given.sglang))
    if given.llama_cpp:
        programs.append(("llama.cpp", f"llama-cpp-python {version('llama_cpp_python')}", given.llama_cpp))
    print("| server | version | what was exported | Veneer's verdict | the server's | equal? | what it said |")
    print("|---|---|---|---|---|---|---|")
    standing = {}
    for server, release, sources in programs:
        asked = [case for case in cases if server_cases.meant(case["name"], server)]
        found = {case["folder"]: veneer.refusals(Path(case["folder"]) / "adapter", server) for case in asked}  # type: ignore[arg-type]
        for case in asked:
            case["settings"] = settings(found[case["folder"]])
        answer = {"answers": in_peft(asked)} if sources is None else told(server.replace(".", "_"), sources, asked)
        standing[server] = answer.get("standing", [])
        for case in asked:
            heard_of = answer["answers"][case["folder"]]
            changed = bool(load_file(Path(case["folder"]) / "changes.safetensors")) or server in ("peft", "llama.cpp")
            ours, theirs = said(found[case["folder"]]), heard(heard_of, changed)
            if server == "llama.cpp" and ours == "setting":  # of the base: a tensor for embedding and head each
                ours = "refused" if "too" in case["name"] else "taken"
            if server == "sglang" and ours == "setting":
                ours = "taken"  # from the start, which sets it
            reasons = [re.sub(r"\s+|\|", " ", one["why"].replace(str(work), ""))[:110] for one in heard_of]
            why = " / ".join(dict.fromkeys(reasons))
            equal = "not compared" if "not compared" in theirs else "yes" if ours == theirs else "**no**"
            print(f"| {server} | {release} | {case['name']} | {ours} | {theirs} | {equal} | {why} |", flush=True)
    for server, names in standing.items():
        if names:
            print(f"\nStood in for, for {server}: {', '.join(dict.fromkeys(names))}.")


if __name__ == "__main__":
    main()
