"""The methods, one file each."""

from veneer.methods.bottleneck import BottleneckAdapter
from veneer.methods.full import FullFineTuning
from veneer.methods.gated import Gated
from veneer.methods.lora import LoRA

__all__ = ["BottleneckAdapter", "FullFineTuning", "Gated", "LoRA"]
