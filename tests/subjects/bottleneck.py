"""Bottleneck adapters at their three placements."""

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
}
