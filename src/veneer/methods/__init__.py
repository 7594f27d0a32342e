"""The methods, one file each."""

from veneer.methods.adalora import AdaLoRA
from veneer.methods.bitfit import BitFit
from veneer.methods.bottleneck import BottleneckAdapter
from veneer.methods.compacter import Compacter
from veneer.methods.dora import DoRA
from veneer.methods.full import FullFineTuning
from veneer.methods.fusion import AdapterFusion
from veneer.methods.gated import Gated
from veneer.methods.hira import HiRA
from veneer.methods.ia3 import IA3
from veneer.methods.invertible import InvertibleAdapter
from veneer.methods.layer_norm import LayerNormTuning
from veneer.methods.llama_adapter import LLaMAAdapter
from veneer.methods.loha import LoHa
from veneer.methods.lora import LoRA
from veneer.methods.lora_fa import LoRAFA
from veneer.methods.miss import MiSS
from veneer.methods.oft import OFT
from veneer.methods.prefix import PrefixTuning
from veneer.methods.prompt import PromptTuning
from veneer.methods.ptuning import PTuning
from veneer.methods.shira import SHiRA
from veneer.methods.trainable_tokens import TrainableTokens
from veneer.methods.vera import VeRA

__all__ = [
    "AdaLoRA",
    "AdapterFusion",
    "BitFit",
    "BottleneckAdapter",
    "Compacter",
    "DoRA",
    "FullFineTuning",
    "Gated",
    "HiRA",
    "IA3",
    "InvertibleAdapter",
    "LLaMAAdapter",
    "LayerNormTuning",
    "LoHa",
    "LoRA",
    "LoRAFA",
    "MiSS",
    "OFT",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "SHiRA",
    "TrainableTokens",
    "VeRA",
]
