"""Veneer: parameter-efficient fine-tuning of transformer models.

    adapter = veneer.attach(model, veneer.LoRA(rank=8), where="attention.q | attention.v")
    ...train as usual...
    veneer.save(adapter, "my-adapter")

Importing this package imports neither transformers nor a quantizer.
"""

__version__ = "0.1.0.dev0"

from veneer.adapter import attach, check
from veneer.calibration import calibrate
from veneer.counting import ParameterCount, count_parameters
from veneer.delta import After, Before, Delta, Input, KeyValue, Method, Place, Weight
from veneer.errors import VeneerError
from veneer.handle import Adapter, adapters
from veneer.merging import detach, merge, unmerge
from veneer.methods import AdaLoRA, FullFineTuning, HiRA, LoRA, MiSS, SHiRA
from veneer.routing import activate, use
from veneer.store import load, save

__all__ = [
    "AdaLoRA",
    "Adapter",
    "After",
    "Before",
    "Delta",
    "FullFineTuning",
    "HiRA",
    "Input",
    "KeyValue",
    "LoRA",
    "Method",
    "MiSS",
    "ParameterCount",
    "Place",
    "SHiRA",
    "VeneerError",
    "Weight",
    "activate",
    "adapters",
    "attach",
    "calibrate",
    "check",
    "count_parameters",
    "detach",
    "load",
    "merge",
    "save",
    "unmerge",
    "use",
]
