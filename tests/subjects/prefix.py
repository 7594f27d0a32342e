"""Prefix tuning, plain and through its network, and prompts attended apart."""

import veneer
from subjects import ACTIVATIONS, Subject

UNMERGED = {"merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS)}

SUBJECTS = {
    "PrefixTuning": Subject(veneer.PrefixTuning(length=3, std=0.5), identity=False, impossible=UNMERGED),
    "LLaMAAdapter": Subject(veneer.LLaMAAdapter(length=3), impossible=UNMERGED),
    "PrefixTuning-MLP": Subject(
        veneer.PrefixTuning(length=3, reparameterization=True, hidden=7), identity=False, impossible=UNMERGED
    ),
}
