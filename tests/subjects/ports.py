"""A small method for each port that no shipped method uses yet."""

from ports import EmbeddingShift, InputScale, KeySlots
from tiny import FAMILIES

import veneer
from subjects import ACTIVATIONS, Subject

TEXT = tuple(family for family in FAMILIES if family != "vit")
UNSHIPPED = {
    "merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS),
    "saving_is_bit_equal": (veneer.errors.FileError, "which this Veneer does not have"),
}

SUBJECTS = {
    "Before": Subject(InputScale(), impossible=UNSHIPPED),
    "Input": Subject(EmbeddingShift(), families=TEXT, impossible=UNSHIPPED),
    "KeyValue": Subject(KeySlots(), identity=False, impossible=UNSHIPPED),
}
