"""The methods, one file each."""

from veneer.methods.full import FullFineTuning
from veneer.methods.lora import LoRA
from veneer.methods.prompt import PromptTuning
from veneer.methods.ptuning import PTuning

__all__ = ["FullFineTuning", "LoRA", "PTuning", "PromptTuning"]
