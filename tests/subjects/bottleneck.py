"""Bottleneck adapters in their three placements."""

import veneer
from subjects import ACTIVATIONS, Subject

UNMERGED = {"merged_equals_adapted": (veneer.errors.NotMergeable, ACTIVATIONS)}

SUBJECTS = {
    "BottleneckAdapter": Subject(
        veneer.BottleneckAdapter(width=4, activation="silu"), where="attention | mlp", impossible=UNMERGED
    ),
    "BottleneckAdapter-parallel": Subject(
        veneer.BottleneckAdapter(width=4, placement="parallel", scaling=4.0), impossible=UNMERGED
    ),
    "BottleneckAdapter-after": Subject(
        veneer.BottleneckAdapter(width=4, placement="after_residual", activation="gelu", scaling="learned"),
        impossible=UNMERGED,
    ),
}
