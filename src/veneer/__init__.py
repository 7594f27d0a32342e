"""Veneer: parameter-efficient fine-tuning of transformer models.

    adapter = veneer.attach(model, veneer.LoRA(rank=8), where="attention.q | attention.v")
    ...train as usual...
    veneer.save(adapter, "my-adapter")

Importing this package imports neither transformers nor a quantizer.
"""

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
from veneer.errors import (
    VeneerError,
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
    AdapterFusion,
    BitFit,
    BottleneckAdapter,
    Compacter,
    DoRA,
    FullFineTuning,
    Gated,
    InvertibleAdapter,
    LayerNormTuning,
    LoRA,
    LoRAFA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    TrainableTokens,
    VeRA,
)
from veneer.routing import (
    activate,
    use,
)
from veneer.starts import (
    start_prefix,
)
from veneer.store import (
    load,
    save,
)

__all__ = [
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
    "FullFineTuning",
    "Gated",
    "IA3",
    "Input",
    "InvertibleAdapter",
    "KeyValue",
    "LayerNormTuning",
    "LoRA",
    "LoRAFA",
    "Method",
    "OFT",
    "PTuning",
    "ParameterCount",
    "Place",
    "PrefixTuning",
    "PromptTuning",
    "TrainableTokens",
    "VeRA",
    "VeneerError",
    "Weight",
    "activate",
    "adapters",
    "attach",
    "check",
    "combine",
    "count_parameters",
    "detach",
    "fuse",
    "load",
    "merge",
    "save",
    "start_prefix",
    "to_lora",
    "unmerge",
    "use",
]
