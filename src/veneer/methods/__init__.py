"""The methods, one file each."""

from veneer.methods.adalora import AdaLoRA
from veneer.methods.full import FullFineTuning
from veneer.methods.lora import LoRA

__all__ = ["AdaLoRA", "FullFineTuning", "LoRA"]
