"""The methods, one file each."""

from veneer.methods.bitfit import BitFit
from veneer.methods.bottleneck import BottleneckAdapter
from veneer.methods.dora import DoRA
from veneer.methods.full import FullFineTuning
from veneer.methods.fusion import AdapterFusion
from veneer.methods.ia3 import IA3
from veneer.methods.layer_norm import LayerNormTuning
from veneer.methods.lora import LoRA
from veneer.methods.lora_fa import LoRAFA
from veneer.methods.oft import OFT
from veneer.methods.vera import VeRA

__all__ = [
    "AdapterFusion",
    "BitFit",
    "BottleneckAdapter",
    "DoRA",
    "FullFineTuning",
    "IA3",
    "LayerNormTuning",
    "LoRA",
    "LoRAFA",
    "OFT",
    "VeRA",
]
