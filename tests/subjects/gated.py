"""Gates on methods at each port that has them."""

import veneer
from subjects import ACTIVATIONS, Subject

UNMERGED = {"merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS)}

SUBJECTS = {
    "Gated-LoRA": Subject(veneer.Gated(veneer.LoRA(rank=4)), impossible=UNMERGED),
    "Gated-BottleneckAdapter": Subject(
        veneer.Gated(veneer.BottleneckAdapter(width=4, activation="silu")), impossible=UNMERGED
    ),
    "Gated-BottleneckAdapter-after": Subject(
        veneer.Gated(veneer.BottleneckAdapter(width=4, placement="after_residual", activation="gelu")),
        impossible=UNMERGED,
    ),
    "Gated-PrefixTuning": Subject(
        veneer.Gated(veneer.PrefixTuning(length=3, std=0.5)), identity=False, impossible=UNMERGED
    ),
}
