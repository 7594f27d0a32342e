"""Make `llama.gguf` beside this file with llama.cpp's own converter, which the sdist of llama-cpp-python 0.3.36 brings.

PYTHONPATH=src:tests python tests/gguf/make.py .../vendor/llama.cpp/convert_lora_to_gguf.py
"""

import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import veneer

HERE = Path(__file__).parent
SIZES = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1}


@torch.no_grad()
def adapted():
    """A tiny Llama, and an adapter on all its linears and its embedding whose numbers follow from their names."""
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES))
    adapter = veneer.attach(model, veneer.LoRA(rank=2, alpha=3.0), "linear | embedding")
    for name, parameter in adapter.named_parameters():
        angles = torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + zlib.crc32(name.encode()) % 1000
        parameter.copy_(angles.sin().view(parameter.shape))
    return model, adapter


def main(converter):
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = adapted()
        veneer.export(model, adapter, Path(folder) / "peft")
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(Path(folder) / "base")
        words = ["--base", Path(folder) / "base", "--outfile", HERE / "llama.gguf", Path(folder) / "peft"]
        subprocess.run([sys.executable, converter, *words], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
