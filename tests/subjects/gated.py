"""Gates on methods at each port that has them."""

import veneer
from subjects import ACTIVATIONS, CALLED, Subject

UNMERGED = {"merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS)}

SUBJECTS = {
    "Gated-LoRA": Subject(veneer.Gated(veneer.LoRA(rank=4)), families=CALLED, impossible=UNMERGED),
    "Gated-BottleneckAdapter": Subject(veneer.Gated(veneer.BottleneckAdapter(width=4)), impossible=UNMERGED),
    "Gated-BottleneckAdapter-after": Subject(
        veneer.Gated(veneer.BottleneckAdapter(width=4, placement="after_residual", activation="gelu")),
        impossible=UNMERGED,
    ),
}
if "PrefixTuning" in veneer.__all__:
    SUBJECTS["Gated-PrefixTuning"] = Subject(
        veneer.Gated(veneer.PrefixTuning(length=3)), identity=False, impossible=UNMERGED
    )
