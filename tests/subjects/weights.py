"""The other methods on weights."""

import veneer
from subjects import BIASED, CALLED, SHARED_BY_ROWS, Subject

FUSED = (veneer.errors.RoutingError, SHARED_BY_ROWS)
ROWS = {"mixed_batch_equals_rows_alone": (veneer.errors.RoutingError, SHARED_BY_ROWS)}

SUBJECTS = {
    "IA3": Subject(veneer.IA3(), families=CALLED),
    "IA3-attention": Subject(veneer.IA3(feedforward="")),
    "VeRA": Subject(veneer.VeRA(rank=8)),
    "LoRAFA": Subject(veneer.LoRAFA(rank=4)),
    "OFT": Subject(veneer.OFT(block_size=8)),
    "OFT-neumann": Subject(
        veneer.OFT(block_size=4, cayley="neumann"),
        where="attention",
        impossible={"mixed_batch_equals_rows_alone": lambda family: FUSED if family == "gpt2" else None},
    ),
    "BitFit": Subject(veneer.BitFit(), families=BIASED, impossible=ROWS),
    "LayerNormTuning": Subject(veneer.LayerNormTuning(), impossible=ROWS),
}
