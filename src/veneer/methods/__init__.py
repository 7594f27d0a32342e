"""The methods, one file each."""

from veneer.methods.adalora import AdaLoRA
from veneer.methods.full import FullFineTuning
from veneer.methods.hira import HiRA
from veneer.methods.lora import LoRA
from veneer.methods.miss import MiSS
from veneer.methods.shira import SHiRA

__all__ = ["AdaLoRA", "FullFineTuning", "HiRA", "LoRA", "MiSS", "SHiRA"]
