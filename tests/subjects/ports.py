"""A small method for each port that no shipped method uses yet."""

from ports import EmbeddingShift, InputScale, KeySlots

import veneer
from subjects import ACTIVATIONS, CALLED, TOKENS, Subject

UNSHIPPED = {
    "merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS),
    "saving_is_bit_equal": (veneer.errors.FileError, "which this Veneer does not have"),
}
ROWS = {"mixed_batch_equals_rows_alone": (veneer.errors.RoutingError, "keys of another length")}

SUBJECTS = {
    "Before": Subject(InputScale(), families=CALLED, impossible=UNSHIPPED),
    "Input": Subject(EmbeddingShift(), families=TOKENS, impossible=UNSHIPPED),
    "KeyValue": Subject(KeySlots(), identity=False, impossible=UNSHIPPED | ROWS),
}
