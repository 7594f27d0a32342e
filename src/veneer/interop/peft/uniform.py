"""LoRA files with one rank and one scale for all modules, which programs read that know no patterns and no rsLoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from veneer.errors import FileError
from veneer.interop.peft.common import PREFIX


def uniform(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], rank: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same adapter with every module at `rank`: rows of zeros below its A, columns of zeros beside its B.

    The scale that most modules have becomes alpha / rank; the B of the others are multiplied by what theirs is of it.
    FileError where a module's rank is larger, or the file is no plain LoRA.
    """
    if config["peft_type"] != "LORA" or config.get("target_parameters"):
        kind = "LoRA on stacks of experts" if config["peft_type"] == "LORA" else config["peft_type"]
        raise FileError(f"pad_rank is for LoRA on single matrices, and this is {kind}. Leave pad_rank out.")
    stems = {key: path for key in tensors if (path := _stem(key, "A")) is not None}
    scales = {stem: _scale(stem, tensors[key].shape[0], config) for key, stem in stems.items()}
    (scale, _), *_ = Counter(scales.values()).most_common(1)
    padded = dict(tensors)
    for key, stem in stems.items():
        A = tensors[key]
        if A.shape[0] > rank:
            raise FileError(
                f"{key} has rank {A.shape[0]}, more than {rank}. Bring it down first with lora_rank={rank}."
            )
        key_b = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        more = rank - A.shape[0]
        padded[key] = F.pad(A, (*[0, 0] * (A.dim() - 1), 0, more))
        padded[key_b] = F.pad(tensors[key_b], (*[0, 0] * (A.dim() - 2), 0, more)) * (scales[stem] / scale)
    alpha = scale * rank
    plain = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False}
    return padded, {**config, **plain, "rank_pattern": {}, "alpha_pattern": {}}


def _stem(key: str, factor: str) -> str | None:
    """The module whose A (or B) this is."""
    for end in (f".lora_{factor}.weight", f".lora_embedding_{factor}"):
        if key.endswith(end):
            return key.removesuffix(end).removeprefix(PREFIX).removesuffix(".base_layer.out_proj")
    return None


def _scale(stem: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = float(config["alpha_pattern"].get(stem, config["lora_alpha"]))
    return alpha / (rank**0.5 if config["use_rslora"] else rank)
