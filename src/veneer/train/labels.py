"""What an encoded example is, and which of its tokens are learned."""

from __future__ import annotations

from typing import TypedDict

IGNORED = -100
"""The label of a token that adds nothing to the loss."""


class Encoded(TypedDict):
    """One example as a collator takes it; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]
