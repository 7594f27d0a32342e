"""The methods, one file each."""

from veneer.methods.bottleneck import BottleneckAdapter
from veneer.methods.compacter import Compacter
from veneer.methods.full import FullFineTuning
from veneer.methods.fusion import AdapterFusion
from veneer.methods.invertible import InvertibleAdapter
from veneer.methods.lora import LoRA

__all__ = ["AdapterFusion", "BottleneckAdapter", "Compacter", "FullFineTuning", "InvertibleAdapter", "LoRA"]
