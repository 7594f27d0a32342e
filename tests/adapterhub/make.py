"""Make the folders beside this file with AdapterHub's own library, and the hidden states that its models give.

pip install --no-deps --target site adapters==1.3.0 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
PYTHONPATH=site:tests python tests/adapterhub/make.py            # make them
PYTHONPATH=site:tests python tests/adapterhub/make.py FOLDER     # or read such folders that Veneer wrote
"""

import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

HERE = Path(__file__).parent
IDS = torch.tensor([[5, 9, 12, 3, 7], [14, 8, 11, 2, 10]])
SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def models():
    """Tiny models whose weights follow from their names, in any version of transformers."""
    built = {
        "bert": BertModel(BertConfig(max_position_embeddings=16, **SIZES)),
        # with the default attention AdapterHub's prefix leaves a decoder without a mask, and tokens see the wrong keys
        "llama": LlamaModel(LlamaConfig(num_key_value_heads=1, attn_implementation="eager", **SIZES)),
        "gpt2": GPT2Model(GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=2, n_head=2)),
    }
    return {name: settled(model).eval() for name, model in built.items()}


@torch.no_grad()
def settled(module, only=""):
    """Every parameter whose name has `only` in it at numbers that follow from its name."""
    for name, parameter in module.named_parameters():
        if only in name:
            angles = torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + zlib.crc32(name.encode()) % 1000
            parameter.copy_((angles.sin() * 0.3).view(parameter.shape))
    return module


def hidden(model):
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def main():
    import adapters
    from adapters import DoubleSeqBnConfig, Fuse, LoRAConfig, ParBnConfig, PrefixTuningConfig, SeqBnConfig

    kinds = {
        "houlsby": DoubleSeqBnConfig(reduction_factor=2),
        "pfeiffer": SeqBnConfig(reduction_factor=2, scaling="learned", ln_before=True),
        "second": SeqBnConfig(reduction_factor=4),
        "third": SeqBnConfig(reduction_factor=2, leave_out=[]),
        "parallel": ParBnConfig(reduction_factor=4),
        "prefix": PrefixTuningConfig(prefix_length=3, bottleneck_size=4),
        "flat": PrefixTuningConfig(prefix_length=2, flat=True),
        "lora": LoRAConfig(r=2, alpha=4, intermediate_lora=True, output_lora=True, leave_out=[0]),
    }
    made = {
        "bert": ["houlsby", "pfeiffer", "second", "third", "parallel", "prefix", "flat", "lora"],
        "llama": ["houlsby", "second", "flat", "prefix", "lora"],
        "gpt2": ["houlsby", "second"],
    }
    outputs = {}
    for family, model in models().items():
        (HERE / family).mkdir(exist_ok=True)
        adapters.init(model)
        outputs[family] = hidden(model)
        for name in made[family]:
            model.add_adapter(name, config=kinds[name])
            settled(model, f".{name}.")
            model.set_active_adapters(name)
            outputs[f"{family}-{name}"] = hidden(model)
            safe = name not in (
                "houlsby",
                "pfeiffer",
                "prefix",
                "flat",
            )  # safetensors refuse what lies there under two names
            model.save_adapter(str(HERE / family / name), name, use_safetensors=safe)
        if family == "bert":
            fused = Fuse("second", "third")
            model.add_adapter_fusion(fused)
            settled(model, "adapter_fusion_layer")
            model.set_active_adapters(fused)
            outputs["bert-fusion"] = hidden(model)
            model.save_adapter_fusion(str(HERE / family / "second,third"), fused, use_safetensors=True)
    save_file({key: value.contiguous() for key, value in outputs.items()}, HERE / "outputs.safetensors")


def read(folder):
    """What AdapterHub's library computes with each folder `<family>-<name>` that Veneer wrote, against Veneer's."""
    import adapters
    from adapters import Fuse

    for path in sorted(Path(folder).iterdir()):
        model = models()[path.name.split("-")[0]]
        adapters.init(model)
        if (path / "adapter_fusion_config.json").exists():
            parts = sorted(part.name for part in path.iterdir() if part.is_dir())
            for part in parts:
                model.load_adapter(str(path / part), use_safetensors=True)
            model.load_adapter_fusion(str(path), use_safetensors=True)
            model.set_active_adapters(Fuse(*parts))
        else:
            model.set_active_adapters(model.load_adapter(str(path), use_safetensors=True))
        difference = (hidden(model) - load_file(path / "expected.safetensors")["hidden"]).abs().max()
        print(f"{path.name}: largest difference {difference:.1e}")


if __name__ == "__main__":
    read(sys.argv[1]) if len(sys.argv) > 1 else main()
