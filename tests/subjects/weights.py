"""Methods that act on a weight, a norm or a bias."""

import veneer
from subjects import BIASED, CALLED, SHARED_BY_ROWS, TOKENS, Subject

ROWS = {"mixed_batch_equals_rows_alone": (veneer.errors.RoutingError, SHARED_BY_ROWS)}

TRUE_BIASES = tuple(family for family in BIASED if family != "t5")
"""T5's relative positions are called a bias, and are a table."""
PLAIN_TOKENS = tuple(family for family in TOKENS if family != "gemma3")
"""Gemma scales its embeddings, which a change beside the lookup would miss."""

SUBJECTS = {
    "BitFit": Subject(veneer.BitFit(), families=TRUE_BIASES, impossible=ROWS),
    "DoRA": Subject(veneer.DoRA(rank=4)),
    "DoRA-rs-bias": Subject(
        veneer.DoRA(rank=3, alpha=6.0, use_rslora=True, dropout=0.2, bias="all"), families=BIASED, impossible=ROWS
    ),
    "IA3": Subject(veneer.IA3(), families=CALLED),
    "LayerNormTuning": Subject(veneer.LayerNormTuning(), impossible=ROWS),
    "LoHa": Subject(veneer.LoHa(rank=3, alpha=6.0)),
    "LoRAFA": Subject(veneer.LoRAFA(rank=4)),
    "OFT": Subject(veneer.OFT(block_size=8)),
    "OFT-share": Subject(veneer.OFT(block_size=16, block_share=True, num_cayley_neumann_terms=5)),
    "TrainableTokens": Subject(veneer.TrainableTokens([9, 11, 30]), families=PLAIN_TOKENS),
    "VeRA": Subject(veneer.VeRA(rank=6)),
    "VeRA-seed": Subject(veneer.VeRA(rank=6, seed=3, save_projection=False)),
}
