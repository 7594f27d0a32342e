"""The methods, one file each."""

from veneer.methods.full import FullFineTuning
from veneer.methods.llama_adapter import LLaMAAdapter
from veneer.methods.lora import LoRA
from veneer.methods.prefix import PrefixTuning

__all__ = ["FullFineTuning", "LLaMAAdapter", "LoRA", "PrefixTuning"]
