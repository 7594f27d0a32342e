"""What the environment tells torch on a CPU, so that a process takes less memory at no time that shows.

oneDNN multiplies bfloat16 by kernels compiled for the shapes at hand and keeps a thousand: each new length of a batch
leaves 17 MiB of them for SmolLM2, 500 MiB after 35 lengths. And tensors of 2 MiB and more in whole huge pages leave
fewer holes in malloc's heap. bench/lengths.py measures both.
"""

from __future__ import annotations

import os

KERNELS = 128
"""That oneDNN keeps; a step on batches of one length takes some fifty."""
SPARING = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KERNELS),
    "LRU_CACHE_CAPACITY": str(KERNELS),  # of torch's layer on oneDNN
    "THP_MEM_ALLOC_ENABLE": "1",
}


def spare_memory() -> None:
    """Set SPARING, but what the environment says already.

    oneDNN reads it at the first product and torch at the first tensor, and never again, so this comes before them.
    """
    for variable, value in SPARING.items():
        os.environ.setdefault(variable, value)
