"""What programs that serve or read PEFT's folders do not take as it is, why, and the option of `veneer.export` for it.

Read in their sources: vLLM 0.33 (lora/peft_helper.py, config/lora.py), SGLang of October 2026 (srt/lora/lora_config.py,
lora.py, lora_manager.py), llama.cpp (convert_lora_to_gguf.py, src/llama-adapter.cpp) and peft 0.21.2. Whether a server
has LoRA for an architecture at all, its own documentation says.
"""

from __future__ import annotations

import re
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


@dataclass(frozen=True)
class Finding:
    """One thing about an adapter that a server does not take as it is.

    `kind` is "refused" where the server stops with an error, "wrong" where it goes on and computes something else,
    "setting" where the server has to be started with an option. `way_out` says what to do.
    """

    kind: Literal["refused", "wrong", "setting"]
    what: str
    way_out: str


def findings(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], server: Server) -> list[Finding]:
    """What the server does not take of a PEFT folder with these contents; config None: no PEFT file."""
    name = _NAMES[server]
    if config is None:
        what = f"PEFT's files cannot hold this adapter as it is, and {name} reads nothing else."
        return [Finding("refused", what, "--to peft --lora-rank 16 where it changes weights; otherwise serve it here.")]
    found = [*_common(config)]
    if server != "peft":
        found += _lora_only(config, tensors, server, name)
    return found


def _common(config: Mapping[str, Any]) -> Iterator[Finding]:
    start = str(config.get("init_lora_weights"))
    if config.get("peft_type") == "LORA" and start.startswith(_CHANGED_BASE):
        yield Finding(
            "wrong",
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
    whole = [key for key in tensors if not _FACTOR.search(key) and "lora_magnitude_vector" not in key]
    if whole or config.get("modules_to_save") or config.get("bias", "none") != "none":
        what = ", ".join(config.get("modules_to_save") or ()) or "biases"
        told: Literal["refused", "wrong"] = "wrong" if server == "sglang" else "refused"
        does = "passes over" if server == "sglang" else "does not take"
        yield Finding(
            told,
            f"It trained {what} whole, which {name} {does}.",
            "--to merged, or --drop-whole, which leaves them out.",
        )
    yield from _scales(config, server, name)
    if any(tensor.dim() != 2 for key, tensor in tensors.items() if _FACTOR.search(key)):
        yield Finding("refused", f"It adapts convolutions, which {name} has no LoRA for.", "--to merged.")
    rank = max(
        (tensor.shape[0] for key, tensor in tensors.items() if re.search(r"lora_(embedding_)?A", key)), default=0
    )
    if config.get("target_parameters"):
        yield Finding(
            "refused", f"It adapts stacks of experts as parameters, which {name} does not read.", "--to merged."
        )
    elif server == "vllm":
        yield from _vllm_rank(rank)
    elif server == "sglang" and rank:
        yield Finding(
            "setting", f"Its rank is {rank}.", f"loaded while it runs: start SGLang with --max-lora-rank {rank}."
        )


def _scales(config: Mapping[str, Any], server: Server, name: str) -> Iterator[Finding]:
    """One rank, one alpha, alpha over rank: what most servers know."""
    ranks = {value for value in (config.get("rank_pattern") or {}).values() if value != config.get("r")}
    alphas = {value for value in (config.get("alpha_pattern") or {}).values() if value != config.get("lora_alpha")}
    if alphas or (ranks and server != "llama.cpp"):
        told: Literal["refused", "wrong"] = "refused" if server == "sglang" else "wrong"
        what = f"Its modules have different {'alphas' if alphas else 'ranks'}; {name} knows one rank and alpha for all."
        yield Finding(told, what, "--pad-rank, which brings all to one rank and scale, exactly.")
    if config.get("use_rslora") and server != "vllm":
        what = f"It scales by alpha / sqrt(rank), and {name} by alpha / rank."
        yield Finding("wrong", what, "--pad-rank, which writes the alpha that gives the same scale.")


def _vllm_rank(rank: int) -> Iterator[Finding]:
    if rank > RANKS[-1]:
        yield Finding("refused", f"Its rank is {rank}, and vLLM's largest {RANKS[-1]}.", f"--lora-rank {RANKS[-1]}.")
    elif rank > 16:
        limit = next(one for one in RANKS if one >= rank)
        yield Finding(
            "setting", f"Its rank is {rank}, over vLLM's default of 16.", f"start vLLM with --max-lora-rank {limit}."
        )
