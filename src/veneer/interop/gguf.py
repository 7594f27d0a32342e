"""LoRA in llama.cpp's GGUF files: `<base tensor>.lora_a` [rank, in] and `.lora_b` [out, rank], and one alpha.

An embedding's `lora_a` is [vocabulary, rank].
llama.cpp scales each pair by alpha over its rank. It lays out the rows of q and k of Llama and Mistral differently from
transformers, with the halves that a rotation pairs next to each other, so their B is permuted as its base is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import FileError, MissingSample, listed
from veneer.interop.peft.common import PREFIX
from veneer.interop.servers import findings

FILE = "adapter.gguf"


@dataclass(frozen=True)
class Family:
    """How llama.cpp calls an architecture, and whether it permutes q and k."""

    name: str
    permuted: bool = False


FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
}

_SHARED = ("token_embd.weight", "output.weight")


def write(file: Path, base: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write PEFT's tensors and config of a LoRA as a GGUF adapter in float32.

    `base` is the base's own config. FileError where llama.cpp has no such adapter, or its names are not known here.
    """
    try:
        import gguf
    except ImportError:
        raise MissingSample("gguf-lora needs the gguf package. Install it: pip install 'veneer[gguf]'.") from None
    kind = str(base.get("model_type"))
    if kind not in FAMILIES:
        raise FileError(f"llama.cpp's names are known here for {listed(FAMILIES, 9)}, not for {kind}.")
    if found := [one for one in findings(config, tensors, "llama.cpp") if one.kind != "setting"]:
        raise FileError(f"{found[0].what} Way out: {found[0].way_out}")
    family = FAMILIES[kind]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(arch, int(base["num_hidden_layers"]))
    writer = gguf.GGUFWriter(file, family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise FileError(f"llama.cpp has no tensor for {module}. Leave it out of the adapter, or use --to merged.")
        if name in _SHARED and base.get("tie_word_embeddings"):
            raise FileError(
                f"llama.cpp has one tensor for this base's embedding and head, and ends with an adapter on either. "
                f"Leave {module} out of the adapter."
            )
        if factor == "embedding_A":  # whose columns are looked up by token, and lie there as rows
            tensor = tensor.T
        factor = factor.removeprefix("embedding_")
        if factor == "B" and family.permuted and module.endswith(("q_proj", "k_proj")):
            heads = int(base["num_attention_heads"])
            if module.endswith("k_proj"):
                heads = int(base.get("num_key_value_heads") or heads)
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{name}.lora_{factor.lower()}", tensor.detach().cpu().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
