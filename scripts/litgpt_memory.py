"""What LitGPT's fine-tuning allocates on one GPU: its own model code and loop, repeated on the meta device.

    .venv/bin/pip install --no-deps --target FOLDER litgpt==0.4.13 lightning==2.4.0 lightning-utilities torchmetrics

and FOLDER on PYTHONPATH: LitGPT asks for an old torch, but its model runs on the new one. What the code around the
model does was read in LitGPT 0.4.13, in Lightning 2.4.0 and in bitsandbytes 0.42.0, which LitGPT pins:

- Fabric makes the logits float32 where they leave the model, and the loop keeps them, and the graph behind them, until
  the next forward is done.
- With `bnb.nf4` every linear is packed, the head too, and from float16. A product makes its weight dense in float16 and
  casts it to the dtype of its input. It holds its input as an attribute of the graph's node, not as a saved tensor, so
  that backward does not let go of it: the inputs of two steps are there at once.
- AdamW's moments are as large as what trains, and the root of all second moments is taken at once; with `bnb.nf4` they
  are paged, and not torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer.plan.devices import CUBLAS_WORKSPACE
from veneer.plan.live import Live, fused_attention, held

MODELS = {
    "falcon-7b": "falcon-7b",
    "gemma-2b": "Gemma-2b",
    "gemma-7b": "Gemma-7b",
    "gemma2-2b": "Gemma-2-2b",
    "gemma2b": "Gemma-2-2b",
    "gemma2-9b": "Gemma-2-9b",
    "llama-2-7b": "Llama-2-7b-hf",
    "llama-3-8b": "Meta-Llama-3-8B",
    "llama-3.1-8b": "Meta-Llama-3.1-8B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.2-3b": "Llama-3.2-3B",
    "mistral-7b": "Mistral-7B-v0.1",
    "mistral-7b-v0.2": "Mistral-7B-v0.2",
    "phi-2": "phi-2",
    "phi-3": "Phi-3-mini-4k-instruct",
    "stablelm-base-alpha-3b": "stablelm-base-alpha-3b",
    "tiny-llama": "tiny-llama-1.1b",
}
"""The folders of LitGPT's config hub, and its names of the models in them."""
BITS = 4 + 32 / 64
"""A weight's: 4 and a float32 magnitude for 64."""


@dataclass(frozen=True)
class Run:
    """A row's settings. full: trains the weights themselves. packs: whether the linears are in 4 bits."""

    model: str
    full: bool
    packs: bool
    rank: str
    targets: str
    batch: int
    length: int

    @classmethod
    def of(cls, row: dict[str, str]) -> Self:
        """By the folder of a row's recipe, since the column `model` has gemma-2b for both Gemmas."""
        model = MODELS[row["url_or_path"].split(":: ")[1].partition("/")[0]]
        how = row["method"] == "full", row["quant"] != "none", row["rank"], row["targets"]
        return cls(model, *how, int(row["micro_batch"]), int(row["seq_len"]))


def parameters(run: Run) -> int:
    """Of a run's model, whose head is always a matrix of its own."""
    return sum(parameter.numel() for parameter in _model(run).parameters())


@cache
def allocated(run: Run) -> int:
    """`max_memory_allocated` of two training steps, in bytes."""
    from litgpt.utils import chunked_cross_entropy

    model = _model(run)
    packed = [module for module in model.modules() if isinstance(module, _Packed)]
    inside = {id(module.weight) for module in packed}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with fused_attention(), Live() as live:
        live.hold(tensor for tensor in held(model) if id(tensor) not in inside)
        live.take(sum(int(module.weight.numel() * BITS / 8) for module in packed))
        for _ in range(2):  # one workspace for the handle of the thread of forward, one for that of backward
            live.take(CUBLAS_WORKSPACE)
        kept: Any = None
        for number in range(2):
            ids = torch.empty(run.batch, run.length, dtype=torch.long, device="meta")
            if run.full:
                kept = model(ids).float()
                loss = chunked_cross_entropy(kept[..., :-1, :], ids[..., 1:])
            else:
                kept = [part.float() for part in model(ids, lm_head_chunk_size=128)]
                kept[-1] = kept[-1][..., :-1, :]
                loss = chunked_cross_entropy(kept, ids[..., 1:])
            loss.backward()
            del loss
            if not run.packs:
                if number == 0:
                    live.take(2 * sum(parameter.nbytes for parameter in trained))
                roots = [torch.empty_like(parameter) for parameter in trained]
                del roots
            for parameter in trained:
                parameter.grad = None
        del kept
    return live.peak


def _model(run: Run) -> Any:
    """On the meta device in bfloat16, with what trains marked, and packed where the row's is."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.model import GPT as Plain
    from litgpt.model import Config as PlainConfig

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            if run.full:
                model: Any = Plain(PlainConfig.from_name(run.model))
            else:
                parts = ("query", "key", "value", "projection", "mlp", "head")
                which = {f"lora_{part}": part in run.targets.split(";") for part in parts}
                size = {"lora_r": int(run.rank), "lora_alpha": 16, "lora_dropout": 0.05}
                config = Config.from_name(run.model, **size, **which)
                model = GPT(config)
                mark_only_lora_as_trainable(model)
    finally:
        torch.set_default_dtype(before)
    model.max_seq_length = run.length
    for path, module in list(model.named_modules()):
        if run.packs and type(module) is nn.Linear:
            model.set_submodule(path, _Packed(module))
        if type(module).__name__ == "LoRAQKVLinear" and not all(module.enable_lora):  # made from numbers otherwise
            module.register_buffer("_lora_ind", torch.empty(sum(module.qkv_shapes), dtype=torch.long, device="meta"))
    return model.train()


class _Packed(nn.Linear):
    """A linear whose weight is not counted where it lies, and is made dense for each product."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.shape, ctx.input = weight.shape, x
        y = x @ _dense(weight.shape, x.dtype).t()
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ _dense(ctx.shape, grads[0].dtype), None, None


def _dense(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.float16).to(dtype)
