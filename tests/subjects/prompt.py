"""Prompt tuning, and P-tuning through each of its networks."""

import veneer
from subjects import ACTIVATIONS, TOKENS, Subject

UNMERGED = {"merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS)}

SUBJECTS = {
    "PromptTuning": Subject(veneer.PromptTuning(length=3), identity=False, families=TOKENS, impossible=UNMERGED),
    "PTuning": Subject(veneer.PTuning(length=3, hidden=5), identity=False, families=TOKENS, impossible=UNMERGED),
    "PTuning-LSTM": Subject(
        veneer.PTuning(length=3, encoder="lstm", hidden=5, layers=1),
        identity=False,
        families=TOKENS,
        impossible=UNMERGED,
    ),
}
