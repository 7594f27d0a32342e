"""Every method, every family, every law, but for the stated impossibilities, each of which is checked to be one."""

from __future__ import annotations

import laws
import pytest
from laws import FAMILIES, LAWS, Case
from ports import EmbeddingShift, InputScale, KeySlots

import veneer

METHODS = {
    "LoRA": veneer.LoRA(rank=4),
    "LoRA-rs-bias": veneer.LoRA(rank=3, alpha=6.0, use_rslora=True, bias="all", init="orthogonal"),
    "FullFineTuning": veneer.FullFineTuning(),
    "Before": InputScale(),
    "Input": EmbeddingShift(),
    "KeyValue": KeySlots(),
}
PORT_ONLY = {"Before", "Input", "KeyValue"}
SHARED_BY_ROWS = "every row of a batch shares a weight"
ACTIVATIONS = "acts on activations; it has no merged weight"


def impossible(law, method: str, family: str) -> tuple[type[Exception], str] | None:
    """The error that states why this law cannot hold here, or None where it must."""
    if law is laws.merged_equals_adapted and method in PORT_ONLY:
        return veneer.errors.NotMergeable, ACTIVATIONS
    if law is laws.mixed_batch_equals_rows_alone:
        if method in ("FullFineTuning", "LoRA-rs-bias") and _has(method, family):
            return veneer.errors.RoutingError, "every row of a batch shares"
        if method == "KeyValue":
            return veneer.errors.RoutingError, "keys of another length"
    if law is laws.saving_is_bit_equal and method in PORT_ONLY:
        return veneer.errors.FileError, "which this Veneer does not have"
    return None


def _has(method: str, family: str) -> bool:
    return method == "FullFineTuning" or family not in ("llama", "t5")


def applies(law, method: str, family: str) -> bool:
    """Whether the law says anything here: not about text where there is none, about embeddings where there are none."""
    kind = FAMILIES[family]
    if law in (laws.generation_with_cache_equals_without, laws.static_cache_equals_dynamic):
        return kind.generates
    if law is laws.padding_changes_nothing:
        return bool(kind.pads)
    return True


CASES = [
    pytest.param(law, method, family, id=f"{law.__name__}-{method}-{family}")
    for law in LAWS
    for method in METHODS
    for family in FAMILIES
    if applies(law, method, family) and not (method == "Input" and family == "vit")
    and not (method == "LoRA-rs-bias" and family in ("llama", "t5"))
]  # fmt: skip


@pytest.mark.parametrize(("law", "method", "family"), CASES)
def test_law(law, method, family):
    case = Case(FAMILIES[family], METHODS[method], identity=method != "KeyValue")
    reason = impossible(law, method, family)
    if reason is None:
        law(case)
    else:
        kind, words = reason
        with pytest.raises(kind, match=words):
            law(case)


def test_compiled_code_equals_eager():
    laws.compiling_changes_nothing(Case(FAMILIES["llama"], METHODS["LoRA"]), backend="inductor")
