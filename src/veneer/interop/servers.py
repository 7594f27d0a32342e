"""What programs that serve or read PEFT's folders do not take as it is, why, and the option of `veneer.export` for it.

`scripts/check_servers.py` holds these rules to the programs' own code: vLLM 0.33.0, SGLang 0.5.23, llama.cpp as of
llama-cpp-python 0.3.36, and peft 0.21.2. Whether a server has LoRA for an architecture, its own documentation says.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Server = Literal["vllm", "sglang", "llama.cpp", "peft"]
SERVERS: tuple[Server, ...] = ("vllm", "sglang", "llama.cpp", "peft")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank; 16 unless told otherwise."""

_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp", "peft": "PEFT"}
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda")
_OPTIONS = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
_HEADS = {"classifier", "score"}
"""The modules that vLLM takes trained whole, in a model that it serves as a classifier."""

Kind = Literal["refused", "wrong", "setting"]


@dataclass(frozen=True)
class Finding:
    """One thing about an adapter that a server does not take as it is.

    `kind` is "refused" where the server stops with an error, "wrong" where it goes on and computes something else,
    "setting" where the server has to be started with an option. `way_out` says what to do.
    """

    kind: Kind
    what: str
    way_out: str


def findings(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], server: Server) -> list[Finding]:
    """What the server does not take of a PEFT folder with these contents; config None: no PEFT file."""
    name = _NAMES[server]
    if config is None:
        what = f"PEFT's files cannot hold this adapter as it is, and {name} reads nothing else."
        return [Finding("refused", what, "--to peft --lora-rank 16 where it changes weights; otherwise serve it here.")]
    found = [*_start(config, server)]
    if server != "peft":
        found += _lora_only(config, tensors, server, name)
    return found


def _start(config: Mapping[str, Any], server: Server) -> Iterator[Finding]:
    start = str(config.get("init_lora_weights")).lower()
    again = server == "peft" and start in ("pissa", "olora")  # of the base alone: PEFT subtracts it again when it loads
    if config.get("peft_type") == "LORA" and start.startswith(_CHANGED_BASE) and not again:
        yield Finding(
            "refused" if server == "vllm" else "wrong",
            f"init_lora_weights is '{start}': it belongs to a base from which its start was subtracted.",
            "save it with Veneer, which folds the start into a LoRA of twice the rank, or with PEFT's "
            "path_initial_model_for_weight_conversion.",
        )


def _lora_only(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], server: Server, name: str
) -> Iterator[Finding]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield Finding("refused", f"It is {kind}, and {name} serves LoRA only.", "--lora-rank 16, or --to merged.")
        return
    if config.get("use_dora"):
        yield Finding(
            "refused", f"{name} has no DoRA.", "--to merged, which is exact, or --lora-rank 16, which rounds."
        )
    yield from _whole(config, tensors, server, name)
    for option in _OPTIONS:
        if config.get(option) and (server, option) != ("llama.cpp", "alora_invocation_tokens"):
            told: Kind = "refused" if server == "vllm" or option == "layer_replication" else "wrong"
            yield Finding(told, f"{name} has no {option}.", "merge it with PEFT.")
    if server != "vllm":
        yield from _scales(config, server, name)
    if any(tensor.dim() != 2 for key, tensor in tensors.items() if _FACTOR.search(key)):
        yield Finding("refused", f"It adapts convolutions, which {name} has no LoRA for.", "--to merged.")
    if server == "llama.cpp" and any(re.search(r"lora_embedding|\.lm_head\.lora_", key) for key in tensors):
        what = "It adapts the embedding or the head, and llama.cpp stops where they are one tensor."
        yield Finding("setting", what, "leave them out, unless the base has a tensor for each.")
    if config.get("target_parameters"):
        yield _experts(tensors, server, name)
    rank = max([int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values()])
    if server == "vllm":
        yield from _vllm_rank(rank)
    elif server == "sglang":
        yield from _sglang(config, tensors)
        yield Finding(
            "setting", f"Its rank is {rank}.", f"loaded while it runs: start SGLang with --max-lora-rank {rank}."
        )


def _whole(config: Mapping[str, Any], tensors: Mapping[str, Tensor], server: Server, name: str) -> Iterator[Finding]:
    """What was trained whole: modules, biases, tokens."""
    keys = [key for key in tensors if not _FACTOR.search(key) and "lora_magnitude_vector" not in key]
    modules = config.get("modules_to_save") or ()
    biases = config.get("bias", "none") != "none"
    if not (keys or modules or biases):
        return
    paths = {key.rpartition(".")[0].rpartition(".")[2] for key in keys}
    if server == "vllm" and not biases and {*modules} <= _HEADS and len(paths) == 1 and paths <= _HEADS:
        return
    passed_over = {
        "vllm": False,
        "sglang": all(
            re.search(r"\.(base_layer|lora_B)\.bias$", key) for key in keys if re.search(r"\.layers\.\d", key)
        ),
        "llama.cpp": all("_layernorm" in key or ".norm" in key for key in keys),
    }[server]
    what = ", ".join(modules) or "biases or tokens"
    does = "passes over" if passed_over else "does not take"
    yield Finding(
        "wrong" if passed_over else "refused",
        f"It trained {what} whole, which {name} {does}.",
        "--to merged, or --drop-whole, which leaves them out.",
    )


def _scales(config: Mapping[str, Any], server: Server, name: str) -> Iterator[Finding]:
    """SGLang knows one rank and alpha over rank, llama.cpp the same with each tensor's own rank."""
    ranks = {value for value in (config.get("rank_pattern") or {}).values() if value != config.get("r")}
    alphas = {value for value in (config.get("alpha_pattern") or {}).values() if value != config.get("lora_alpha")}
    if ranks and server == "sglang":
        what = f"Its modules have different ranks; {name} knows one for all."
        yield Finding("refused", what, "--pad-rank, which brings all to one rank and scale, exactly.")
    elif alphas:
        what = f"Its modules have different alphas; {name} knows one for all."
        yield Finding("wrong", what, "--pad-rank, which brings all to one rank and scale, exactly.")
    if config.get("use_rslora"):
        what = f"It scales by alpha / sqrt(rank), and {name} by alpha / rank."
        yield Finding("wrong", what, "--pad-rank, which writes the alpha that gives the same scale.")


def _experts(tensors: Mapping[str, Tensor], server: Server, name: str) -> Finding:
    """Stacks of experts: vLLM reads both stacks of a module together, in one of its two formats."""
    inner = {key.partition(".base_layer.lora_")[0] for key in tensors if ".experts.base_layer.lora_" in key}
    outer = {key.partition(".lora_")[0] for key in tensors if ".experts.lora_" in key}
    if server != "vllm" or inner != outer:
        return Finding(
            "refused", f"It adapts stacks of experts as parameters, which {name} does not read.", "--to merged."
        )
    return Finding(
        "setting",
        "It adapts experts in stacks, which vLLM reads in a few models only unless told.",
        "start vLLM with --enable-mixed-moe-lora-format, and load it with is_3d_lora_weight.",
    )


def _sglang(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """SGLang joins q, k and v into one matrix, and gate and up: it finds v beside q, q beside k, gate beside up."""
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield Finding("refused", f"It names its modules by '{targets}', and SGLang reads lists only.", "--to peft.")
    beside = defaultdict(set)
    for key in tensors:
        if match := re.match(r"(.*)\.(\w+)_proj\.lora_", key):
            beside[match[1]].add(match[2])
    for parent, found in beside.items():
        if ("q" in found) != ("v" in found) or ("k" in found and "q" not in found) or found & {"gate", "up"} == {"up"}:
            yield Finding(
                "refused",
                f"It adapts {', '.join(sorted(found))} of {parent}; SGLang needs q and v together, and gate for up.",
                "--to merged, or train those too.",
            )
            return


def _vllm_rank(rank: int) -> Iterator[Finding]:
    if rank > RANKS[-1]:
        yield Finding("refused", f"Its rank is {rank}, and vLLM's largest {RANKS[-1]}.", f"--lora-rank {RANKS[-1]}.")
    elif rank > 16:
        limit = next(one for one in RANKS if one >= rank)
        yield Finding(
            "setting", f"Its rank is {rank}, over vLLM's default of 16.", f"start vLLM with --max-lora-rank {limit}."
        )
