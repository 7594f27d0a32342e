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
    DoRA,
    FullFineTuning,
    LayerNormTuning,
    LoRA,
    LoRAFA,
    VeRA,
)
from veneer.quantizing import (
    NF4,
    quantize,
)
from veneer.routing import (
    activate,
    use,
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
    "Delta",
    "DoRA",
    "FullFineTuning",
    "IA3",
    "Input",
    "KeyValue",
    "LayerNormTuning",
    "LoRA",
    "LoRAFA",
    "Method",
    "NF4",
    "OFT",
    "ParameterCount",
    "Place",
    "VeRA",
    "VeneerError",
    "Weight",
    "activate",
    "adapters",
    "attach",
    "check",
    "count_parameters",
    "detach",
    "fuse",
    "load",
    "merge",
    "quantize",
    "save",
    "unmerge",
    "use",
]
