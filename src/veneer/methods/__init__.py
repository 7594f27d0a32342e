"""The methods, one file each."""

from veneer.methods.full import FullFineTuning
from veneer.methods.lora import LoRA
from veneer.methods.prefix import PrefixTuning

__all__ = ["FullFineTuning", "LoRA", "PrefixTuning"]
