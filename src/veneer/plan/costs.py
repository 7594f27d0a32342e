"""What training one method on one model costs, from a step of a few of its blocks on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.adapter import attach
from veneer.counting import count_parameters
from veneer.delta import Method
from veneer.methods import FullFineTuning, PromptTuning
from veneer.plan.devices import CUBLAS_WORKSPACE, CUDA_CONTEXT
from veneer.plan.live import Live, fused_attention, held
from veneer.plan.presets import preset
from veneer.seams import loading
from veneer.seams.checkpointing import checkpoint_activations

FEW, MORE = 2, 4
"""Numbers of blocks that are built; what lies between them is one block, twice."""
BITS = 4 + 8 / 64 + 32 / 64 / 256
"""Of a weight in NF4 with double quantization."""
_STEPS: dict[tuple[object, ...], Mapping[str, int]] = {}


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one training step on a 16-bit base, and what the adapter leaves behind.

    weights: of the base. trained: adapter, gradients and Adam's moments. activations: whatever else is alive at the
    peak, logits included. peak: all of it, with the CUDA context. sites: spots where a forward does more while the
    adapter is not merged. flops: of a step, from two operations a weight and token. saved: bytes of the adapter's file.
    """

    trainable: int
    total: int
    weights: int
    trained: int
    activations: int
    peak: int
    sites: int
    flops: float
    saved: int

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base."""
        return self.trainable / self.total


def cost(
    model: str,
    method: Method,
    where: str | None = None,
    *,
    four_bits: bool = False,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = True,
) -> Cost:
    """The cost of training a preset by a method, in bfloat16, with AdamW and transformers' loss.

    `four_bits` packs the linears (NF4 with double quantization, 4.127 bits a weight). Adapters are float32 with two
    float32 moments and are saved in float32; full fine-tuning trains the bfloat16 weights with bfloat16 moments.
    """
    config = preset(model)
    few, more = (_step(model, layers, method, where, batch, length, checkpointing) for layers in (FEW, MORE))
    layers = config.num_hidden_layers
    at = {key: few[key] + (more[key] - few[key]) * (layers - FEW) // (MORE - FEW) for key in few}
    whole = isinstance(method, FullFineTuning)
    trained = at["trainable"] * (6 if whole else 16)  # gradient and moments; the weights of an adapter, too
    if four_bits:
        at["weights"] += round(at["linear"] * (BITS / 8 - 2))
        at["activations"] += few["dense"]  # one weight made dense
    peak = at["weights"] + trained + at["activations"] + 2 * CUBLAS_WORKSPACE + round(CUDA_CONTEXT[1])
    passes = 2 + (1 if checkpointing else 0) + (1 if whole else 0)
    return Cost(
        at["trainable"],
        at["total"],
        at["weights"],
        trained,
        at["activations"],
        peak,
        at["sites"],
        2.0 * at["active"] * batch * length * passes,
        at["trainable"] * (2 if whole else 4),
    )


def _step(
    name: str, layers: int, method: Method, where: str | None, batch: int, length: int, checkpointing: bool
) -> Mapping[str, int]:
    """The counts of a model of so many blocks; `linear` is weights that can be packed, `dense` bytes of the largest."""
    key = (name, layers, repr(method), where, batch, length, checkpointing)
    if key not in _STEPS:
        _STEPS[key] = _traced(name, layers, method, where, batch, length, checkpointing)
    return _STEPS[key]


def _traced(
    name: str, layers: int, method: Method, where: str | None, batch: int, length: int, checkpointing: bool
) -> Mapping[str, int]:
    config = preset(name)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if config.is_encoder_decoder:
        config.num_decoder_layers = layers
    model: Any = loading.without_weights(config, loading.class_of(config)).to(torch.bfloat16)
    total = count_parameters(model).total
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    base = {id(tensor): tensor for tensor in held(model)}
    weights = sum(tensor.nbytes for tensor in base.values())
    active = sum(tensor.numel() for tensor in base.values() if tensor.dim() == 2)
    active -= _idle(config, model)
    if isinstance(method, FullFineTuning):
        adapter_sites = 0
        trainable = total
    else:
        adapter = attach(model, method, where=where)
        trainable = sum(parameter.numel() for parameter in adapter.parameters())
        adapter_sites = len(adapter.claims)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    with fused_attention(), Live() as live:
        live.hold(held(model))
        before = live.now
        ids = torch.empty(batch, length - _ahead(config, method, length), dtype=torch.long, device="meta")
        out = model(input_ids=ids, labels=ids)
        forward = live.now
        out.loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        activations = max(live.peak - before - gradients, forward - before)
    return {
        "trainable": trainable,
        "total": total,
        "weights": weights,
        "activations": activations,
        "sites": adapter_sites,
        "active": active,
        "linear": sum(module.weight.numel() for module in linears),
        "dense": max(module.weight.numel() for module in linears) * 2 if linears else 0,
    }


def _ahead(config: Any, method: Method, length: int) -> int:
    """By how much an example is cut, so that the tokens that a prompt puts in front of it have positions, too."""
    positions = config.to_dict().get(config.attribute_map.get("max_position_embeddings", "max_position_embeddings"))
    if positions is None or not isinstance(method, PromptTuning):
        return 0
    over: int = length + method.length - positions
    return max(0, over)


def _idle(config: Any, model: Any) -> int:
    """Weights of a table that is only looked up in: the input embedding, where the head does not read it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return 0
    count: int = embedding.weight.numel()
    return count
