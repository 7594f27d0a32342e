"""Methods that act on a weight, a norm or a bias."""

import veneer
from subjects import BIASED, CALLED, SHARED_BY_ROWS, TOKENS, Subject

ROWS = {"mixed_batch_equals_rows_alone": (veneer.errors.RoutingError, SHARED_BY_ROWS)}

SUBJECTS = {
    "BitFit": Subject(veneer.BitFit(), families=BIASED, impossible=ROWS),
    "DoRA": Subject(veneer.DoRA(rank=4)),
    "DoRA-rs-bias": Subject(
        veneer.DoRA(rank=3, alpha=6.0, use_rslora=True, dropout=0.2, bias="all"), families=BIASED, impossible=ROWS
    ),
    "IA3": Subject(veneer.IA3(), families=CALLED),
    "LayerNormTuning": Subject(veneer.LayerNormTuning(), impossible=ROWS),
    "LoRAFA": Subject(veneer.LoRAFA(rank=4)),
    "OFT": Subject(veneer.OFT(block_size=8)),
    "OFT-share": Subject(veneer.OFT(block_size=16, block_share=True, num_cayley_neumann_terms=5)),
    "TrainableTokens": Subject(veneer.TrainableTokens([9, 11, 30]), families=TOKENS),
    "VeRA": Subject(veneer.VeRA(rank=6)),
    "VeRA-seed": Subject(veneer.VeRA(rank=6, seed=3, save_projection=False)),
}
