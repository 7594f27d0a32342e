"""What vLLM's own code does with adapters' folders, on a CPU and without its kernels: run by `check_servers.py`.

    python scripts/server_vllm.py SOURCES < cases.json > verdicts.json

SOURCES holds the unpacked `vllm/` of a wheel. The model is vLLM's own class with LoRA layers put in by its own manager;
an adapter goes through WorkerLoRAManager.add_adapter, which ends with the factors in the buffers that a kernel reads.
What stands in the buffers is multiplied out and compared with what the adapter does to its base. No token is generated.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from server_code import compared, imported
from torch import Tensor, nn

sys.path.insert(0, sys.argv[1])
RANK = 16
"""vLLM's --max-lora-rank where it is not given."""


def start() -> list[str]:
    """Import vLLM for a CPU, in one process of its own; what was stood in for."""
    standing = imported(["vllm.platforms.cpu"])
    import vllm.platforms

    vllm.platforms._current_platform = vllm.platforms.cpu.CpuPlatform()
    standing += imported(["vllm.lora.worker_manager", "vllm.model_executor.model_loader.utils", "vllm.config"])
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda call: call()  # a process of its own would have no stand-ins
    imported(["vllm.lora.layers.fused_moe"])
    vllm.lora.layers.fused_moe.FusedMoEWithLoRA.__init__ = without_kernel
    vllm.lora.layers.fused_moe.FusedMoEWithLoRA.set_mapping = lambda self, wrapper: None
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
        initialize_model_parallel()
    return standing


def without_kernel(self: Any, base_layer: Any) -> None:
    """What a layer of experts needs to hold factors: its own start asks for a kernel, which a CPU has not."""
    nn.Module.__init__(self)
    self.base_layer, self.moe_config, self.device = base_layer, base_layer.moe_config, torch.device("cpu")
    self.tp_size, self.tp_rank, self._w13_slices, self._enable_aux_cuda_stream = 1, 0, 2, False
    self.n_slices = self.local_num_experts * 3


def manager(base: Path, rank: int, mixed: bool) -> Any:
    """vLLM's manager of LoRA with its model of `base`, before any weight is loaded."""
    from vllm.config import DeviceConfig, LoRAConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model

    model_config = ModelConfig(model=str(base), dtype="float32", enforce_eager=True, max_model_len=64)
    lora = LoRAConfig(max_lora_rank=rank, lora_dtype=torch.float32, enable_mixed_moe_lora_format=mixed)
    lora.verify_with_model_config(model_config)
    config = VllmConfig(model_config=model_config, lora_config=lora, device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        model = initialize_model(config, model_class=get_model_architecture(model_config)[0])
        made = WorkerLoRAManager(config, torch.device("cpu"), getattr(model, "embedding_modules", {}))
        made.create_lora_manager(model, config)
    made._adapter_manager.model_folder = base
    return made


def verdict(worker: Any, adapter: Path, changes: dict[str, Tensor], mixed: bool) -> dict[str, str]:
    """Load an adapter into vLLM's buffers and compare."""
    from vllm.lora.request import LoRARequest

    worker.remove_all_adapters()
    try:
        worker.add_adapter(LoRARequest("case", 1, str(adapter), is_3d_lora_weight=mixed))
    except Exception as error:
        return {"verdict": "refused", "why": f"{type(error).__name__}: {error}"}
    inner = worker._adapter_manager
    seen = {key: change for name, module in inner.modules.items() for key, change in buffers(inner, name, module)}
    return compared(seen, changes)


def buffers(inner: Any, name: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """(parameter in transformers' names, its change) of slot 0 of a module's buffers."""
    if hasattr(module, "full_weight_stacked") and module.full_module_enabled[0]:  # a classifier's head, whole
        before = load_file(Path(inner.model_folder) / "model.safetensors")[f"{name}.weight"]
        return [(f"{name}.weight", module.full_weight_stacked[0, 0, : len(before)] - before)]
    if hasattr(module, "w13_lora_a_stacked"):
        halves = zip(module.w13_lora_b_stacked, module.w13_lora_a_stacked, strict=True)
        up, down = (
            torch.cat([b[0] @ a[0] for b, a in halves], 1),
            module.w2_lora_b_stacked[0][0] @ module.w2_lora_a_stacked[0][0],
        )
        return [(f"{name}.gate_up_proj", up), (f"{name}.down_proj", down)]
    path, _, last = name.rpartition(".")
    parts = inner.packed_modules_mapping.get(last, [last])
    a, b = module.lora_a_stacked, module.lora_b_stacked
    if isinstance(a, Tensor):  # an embedding or the head
        product = a[0] @ b[0, 0].T if a.dim() == 3 else b[0, 0] @ a[0, 0]
        return [(f"{name}.weight", product[: inner.vocab_size])]
    return [(f"{path}.{part}.weight", b[i][0, 0] @ a[i][0, 0]) for i, part in enumerate(parts)]


def main() -> None:
    """Verdicts on all the cases, each as often as it names settings: (rank, mixed format of experts)."""
    standing = start()
    workers: dict[tuple[str, int, bool], Any] = {}
    answers: dict[str, list[dict[str, str]]] = {}
    for case in json.load(sys.stdin):
        folder = Path(case["folder"])
        changes = load_file(folder / "changes.safetensors")
        for rank, mixed in case["settings"]:
            key = (case["base"], rank, mixed)
            if key not in workers:
                workers[key] = manager(Path(case["base"]), rank, mixed)
            answers.setdefault(case["folder"], []).append(verdict(workers[key], folder / "adapter", changes, mixed))
    print(json.dumps({"standing": standing, "answers": answers}))


if __name__ == "__main__":
    main()
