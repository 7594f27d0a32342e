"""Veneer: parameter-efficient fine-tuning of transformer models.

    adapter = veneer.attach(model, veneer.LoRA(rank=8), where="attention.q | attention.v")
    ...train as usual...
    veneer.save(adapter, "my-adapter")

Importing this package imports neither transformers nor a quantizer.
"""

from typing import Any as _Any

__version__ = "0.1.0.dev0"

from veneer.adapter import (
    attach,
    check,
)
from veneer.arithmetic import (
    Computed,
    combine,
    to_lora,
)
from veneer.calibration import (
    calibrate,
)
from veneer.counting import (
    ParameterCount,
    count_parameters,
)
from veneer.delta import (
    After,
    Before,
    Delta,
    Input,
    KeyValue,
    Method,
    Place,
    Weight,
)
from veneer.dequantizing import (
    dequantize,
)
from veneer.drift import (
    Drift,
)
from veneer.errors import (
    VeneerError,
)
from veneer.exporting import (
    Exported,
    export,
    refusals,
)
from veneer.fusing import (
    fuse,
)
from veneer.handle import (
    Adapter,
    adapters,
)
from veneer.merging import (
    detach,
    merge,
    unmerge,
)
from veneer.methods import (
    IA3,
    OFT,
    AdaLoRA,
    AdapterFusion,
    BitFit,
    BottleneckAdapter,
    Compacter,
    DoRA,
    FullFineTuning,
    Gated,
    HiRA,
    InvertibleAdapter,
    LayerNormTuning,
    LLaMAAdapter,
    LoHa,
    LoRA,
    LoRAFA,
    MiSS,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SHiRA,
    TrainableTokens,
    VeRA,
)
from veneer.optim import (
    FlatAdamW,
    PagedAdamW,
    optimizer,
)
from veneer.quantizing import (
    NF4,
    load_quantized,
    quantize,
    save_quantized,
)
from veneer.repairing import (
    Repair,
    quantize_around,
)
from veneer.routing import (
    activate,
    use,
)
from veneer.seams.checkpointing import (
    checkpoint_activations,
)
from veneer.seams.loss import (
    chunk_loss,
)
from veneer.starts import (
    start_prefix,
)
from veneer.store import (
    load,
    save,
)
from veneer.swapping import (
    swap,
)

__all__ = [
    "AdaLoRA",
    "Adapter",
    "AdapterFusion",
    "After",
    "Before",
    "BitFit",
    "BottleneckAdapter",
    "Compacter",
    "Computed",
    "Delta",
    "DoRA",
    "Drift",
    "Exported",
    "FlatAdamW",
    "FullFineTuning",
    "Gated",
    "HiRA",
    "IA3",
    "Input",
    "InvertibleAdapter",
    "KeyValue",
    "LLaMAAdapter",
    "LayerNormTuning",
    "LoHa",
    "LoRA",
    "LoRAFA",
    "Method",
    "MiSS",
    "NF4",
    "OFT",
    "PTuning",
    "PagedAdamW",
    "ParameterCount",
    "Place",
    "PrefixTuning",
    "PromptTuning",
    "Repair",
    "SHiRA",
    "TrainableTokens",
    "VeRA",
    "VeneerError",
    "Weight",
    "activate",
    "adapters",
    "attach",
    "calibrate",
    "check",
    "checkpoint_activations",
    "chunk_loss",
    "combine",
    "count_parameters",
    "dequantize",
    "detach",
    "export",
    "fuse",
    "load",
    "load_quantized",
    "merge",
    "optimizer",
    "plan",
    "quantize",
    "quantize_around",
    "refusals",
    "save",
    "save_quantized",
    "start_prefix",
    "swap",
    "to_lora",
    "train",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> _Any:
    """`veneer.train` and `veneer.plan`, which import transformers."""
    if name in ("train", "plan"):
        from importlib import import_module

        return import_module(f"veneer.{name}")
    raise AttributeError(f"module 'veneer' has no attribute '{name}'")
