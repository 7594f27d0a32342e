"""Bottleneck adapters at their three placements, and attention over several."""

import veneer
from subjects import ACTIVATIONS, Subject

UNMERGED = {"merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS)}
EVERYWHERE = "attention | mlp"

SUBJECTS = {
    "BottleneckAdapter": Subject(veneer.BottleneckAdapter(width=4), where=EVERYWHERE, impossible=UNMERGED),
    "BottleneckAdapter-parallel": Subject(
        veneer.BottleneckAdapter(width=4, placement="parallel", activation="tanh", scaling="learned", bias=False),
        where=EVERYWHERE,
        impossible=UNMERGED,
    ),
    "BottleneckAdapter-after-residual": Subject(
        veneer.BottleneckAdapter(
            reduction_factor=5, placement="after_residual", activation="silu", scaling="channel", dropout=0.2, norm=True
        ),
        where=EVERYWHERE,
        impossible=UNMERGED,
    ),
    "AdapterFusion": Subject(
        veneer.AdapterFusion(
            parts={
                "one": veneer.BottleneckAdapter(width=3),
                "two": veneer.BottleneckAdapter(width=4, activation="gelu"),
            }
        ),
        impossible=UNMERGED,
    ),
    "AdapterFusion-after-residual": Subject(
        veneer.AdapterFusion(
            parts={name: veneer.BottleneckAdapter.pfeiffer(reduction_factor=8) for name in ("one", "two", "three")}
        ),
        impossible=UNMERGED,
    ),
}
