"""The methods, one file each."""

from veneer.methods.bitfit import BitFit
from veneer.methods.bottleneck import BottleneckAdapter
from veneer.methods.compacter import Compacter
from veneer.methods.dora import DoRA
from veneer.methods.full import FullFineTuning
from veneer.methods.fusion import AdapterFusion
from veneer.methods.gated import Gated
from veneer.methods.ia3 import IA3
from veneer.methods.invertible import InvertibleAdapter
from veneer.methods.layer_norm import LayerNormTuning
from veneer.methods.lora import LoRA
from veneer.methods.lora_fa import LoRAFA
from veneer.methods.oft import OFT
from veneer.methods.prefix import PrefixTuning
from veneer.methods.prompt import PromptTuning
from veneer.methods.ptuning import PTuning
from veneer.methods.trainable_tokens import TrainableTokens
from veneer.methods.vera import VeRA

__all__ = [
    "AdapterFusion",
    "BitFit",
    "BottleneckAdapter",
    "Compacter",
    "DoRA",
    "FullFineTuning",
    "Gated",
    "IA3",
    "InvertibleAdapter",
    "LayerNormTuning",
    "LoRA",
    "LoRAFA",
    "OFT",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "TrainableTokens",
    "VeRA",
]
