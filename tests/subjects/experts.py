"""LoRA on the experts of a mixture, whose weights no layer multiplies by."""

import veneer
from subjects import SHARED_BY_ROWS, Subject

ROWS = {"mixed_batch_equals_rows_alone": (veneer.errors.RoutingError, SHARED_BY_ROWS)}

SUBJECTS = {
    "LoRA-experts": Subject(veneer.LoRA(rank=2), where="*.experts", families=("mixtral",), impossible=ROWS),
}
