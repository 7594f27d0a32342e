"""What SGLang's own code does with adapters' folders, on a CPU and without its kernels: run by `check_servers.py`.

    python scripts/server_sglang.py SOURCES < cases.json > verdicts.json

SOURCES holds a wheel's unpacked `sglang/`. LoRAManager.init_state reads and checks a folder as when SGLang starts, and
fetch_new_loras puts its factors where a kernel reads them; the base is stood in for by the names of its layers. What
stands in the buffers is multiplied out and compared with what the adapter does to its base. No token is generated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from server_code import compared, imported
from torch import Tensor, nn
from transformers import AutoConfig

sys.path.insert(0, sys.argv[1])
ONE = SimpleNamespace(
    tp_size=1,
    tp_rank=0,
    attn_tp_size=1,
    attn_dp_enabled=False,
    dcp_replicate_q_proj=False,
    pp_group=SimpleNamespace(is_last_rank=True),
)
"""One process."""
LAYERS = {"self_attn": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}


class Layer(nn.Module):
    """A layer with LoRA on one process, which has the whole of both factors."""

    def slice_lora_a_weights(self, A: Tensor) -> Tensor:
        return A

    def slice_lora_b_weights(self, B: Tensor) -> Tensor:
        return B


def manager(base: Path) -> Any:
    """SGLang's manager of LoRA for a base, without layers."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora import lora_manager, mem_pool
    from sglang.srt.model_loader import loader

    def tensors(self: Any, source: Any) -> Iterator[tuple[str, Tensor]]:
        """SGLang's reader of files asks a running server how."""
        yield from load_file(Path(source.model_or_path) / "adapter_model.safetensors").items()

    loader.DefaultModelLoader._get_weights_iterator = tensors
    lora_manager.get_parallel = mem_pool.get_parallel = lambda: ONE

    class Manager(lora_manager.LoRAManager):  # type: ignore[misc]
        def __init__(self) -> None:
            self.base_hf_config = AutoConfig.from_pretrained(base)
            self.base_model = nn.Linear(1, 1)
            self.base_model.config = self.base_hf_config
            self.max_loras_per_batch, self.dtype, self.device = 2, torch.float32, torch.device("cpu")
            self.load_config, self.eviction_policy, self.lora_backend = LoadConfig(), "lru", MagicMock()
            self.attn_dp_enabled = self.enable_lora_overlap_loading = self.lora_strict_loading = False
            self.lora_added_tokens_size = self._experts_shared_outer_override = self.speculative_algorithm = None

        def init_lora_modules(self) -> None:
            self.lora_modules = [
                {f"model.layers.{i}.{part}.{name}": Layer() for part, names in LAYERS.items() for name in names}
                for i in range(self.base_hf_config.num_hidden_layers)
            ]
            for modules in self.lora_modules:
                for name in [one for one in modules if one.rpartition(".")[2] not in self.target_modules]:
                    del modules[name]
            self.embed_tokens_module = self.lm_head_module = Layer()

        def update_lora_info(self) -> None:
            pass

    return Manager()


def verdict(base: Path, adapter: Path, changes: dict[str, Tensor]) -> dict[str, str]:
    """Load an adapter into SGLang's buffers and compare."""
    from sglang.srt.lora.lora_registry import LoRARef

    ref, made = LoRARef(lora_name="case", lora_path=str(adapter), pinned=False), manager(base)
    try:
        made.init_state(lora_paths=[ref])
        made.fetch_new_loras({ref.lora_id})
    except Exception as error:
        return {"verdict": "refused", "why": f"{type(error).__name__}: {error}"}
    return compared(buffers(made, ref.lora_id), changes)


def buffers(made: Any, uid: str) -> dict[str, Tensor]:
    """The changes of parameters, in transformers' names, that the adapter's slot of the buffers means."""
    pool, config, lora = made.memory_pool, made.base_hf_config, made.loras[uid]
    slot, rank = pool.get_buffer_id(uid), lora.config.r
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    halves = [config.intermediate_size] * 2
    parts = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), [config.head_dim * count for count in heads]),
        "gate_up_proj": (("gate_proj", "up_proj"), halves),
    }
    found = {}
    for i, modules in enumerate(made.lora_modules):
        for path in modules:
            parent, _, name = path.rpartition(".")
            A, B = pool.A_buffer[name][i][slot], pool.B_buffer[name][i][slot, :, :rank] * lora.scaling
            names, sizes = parts.get(name, ((name,), [len(B)]))
            for n, (part, rows) in enumerate(zip(names, B.split(sizes), strict=True)):
                found[f"{parent}.{part}.weight"] = rows @ A[n * rank : (n + 1) * rank]
    for name, A_of, B_of, path in (
        ("embed_tokens", pool.embedding_A_buffer, pool.embedding_B_buffer, "model.embed_tokens.weight"),
        ("lm_head", pool.lm_head_A_buffer, pool.lm_head_B_buffer, "lm_head.weight"),
    ):
        if name in A_of:
            change = B_of[name][slot][:, :rank] @ A_of[name][slot][:rank] * lora.scaling
            found[path] = change.T if name == "embed_tokens" else change
    return found


def main() -> None:
    """Verdicts on all the cases."""
    standing = imported(["sglang.srt.runtime_context", "sglang.srt.lora.lora_manager"])
    answers = {}
    for case in json.load(sys.stdin):
        folder = Path(case["folder"])
        changes = load_file(folder / "changes.safetensors")
        answers[case["folder"]] = [verdict(Path(case["base"]), folder / "adapter", changes)]
        print(case["name"], answers[case["folder"]], file=sys.stderr, flush=True)
    print(json.dumps({"standing": standing, "answers": answers}))


if __name__ == "__main__":
    main()
