"""LoRA and full fine-tuning."""

import veneer
from subjects import BIASED, SHARED_BY_ROWS, Subject

STORED = {"a_quantized_base_equals_its_dense_twin": (veneer.errors.MethodError, "it is stored as")}
ROWS = {"mixed_batch_equals_rows_alone": (veneer.errors.RoutingError, SHARED_BY_ROWS)}

SUBJECTS = {
    "LoRA": Subject(veneer.LoRA(rank=4)),
    "LoRA-rs-bias": Subject(
        veneer.LoRA(rank=3, alpha=6.0, use_rslora=True, bias="all", init="orthogonal"), families=BIASED, impossible=ROWS
    ),
    "DoRA": Subject(veneer.DoRA(rank=4)),
    "FullFineTuning": Subject(veneer.FullFineTuning(), impossible=ROWS | STORED),
}
