"""transformers' own interfaces: the attention registry, embeddings and heads."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import files, formats, site
from veneer.errors import FileError
from veneer.formats import dense
from veneer.formats.nf4_storage import Holder

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, Callable[[], Any]], Any]


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is one of transformers'; never imports it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def input_embedding(model: Any) -> nn.Module | None:
    """The token embedding, or None."""
    if not is_pretrained(model):
        return None
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Embedding) else None


def head(model: Any) -> nn.Module | None:
    """The output projection over the vocabulary, or None."""
    if not is_pretrained(model):
        return None
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def base_prefix_name(model: Any) -> str:
    """What models with a head call the bare model within them, or the empty string."""
    return model.base_model_prefix if is_pretrained(model) else ""


def base_prefix(model: Any) -> str:
    """What the paths of the bare model begin with in this one: `model.` below a head, nothing in the bare model."""
    name = base_prefix_name(model)
    return f"{name}." if name and name in model._modules else ""


def config(model: Any) -> dict[str, Any]:
    """The config of a transformers model as plain values; empty for any other."""
    found: dict[str, Any] = model.config.to_dict() if is_pretrained(model) else {}
    return found


def positions(config: Any) -> int | None:
    """How many tokens a model has positions for, by its config; None where that does not say."""
    found = getattr(config.get_text_config(decoder=False), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def stored_dtype(config: Any) -> torch.dtype:
    """What a config says its weights are stored in; float32 where it does not say."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = getattr(torch, found) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def width(model: Any) -> int:
    """How wide the model's residual stream is."""
    hidden: int = model.config.hidden_size
    return hidden


def is_causal(model: nn.Module) -> bool:
    """Whether an attention of the model hides later tokens."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def checkpointed(model: nn.Module) -> list[str]:
    """Paths of the blocks that gradient checkpointing recomputes as a whole."""
    layers = sys.modules.get("transformers.modeling_layers")
    if layers is None:
        return []
    return [path for path, module in model.named_modules() if isinstance(module, layers.GradientCheckpointingLayer)]


def describe(model: Any) -> dict[str, str]:
    """What an adapter's file says of its base model: class, model type, name or path."""
    described = {"class": type(model).__name__}
    if is_pretrained(model):
        described |= {"model_type": model.config.model_type, "name_or_path": model.config.name_or_path or ""}
    return described


def config_with(model_type: str, architecture: str, options: Mapping[str, Any]) -> Any:
    """A config of this type, whose model is of the class `architecture`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, architectures=[architecture], **options)


@contextmanager
def observed_attention(observe: Observer) -> Iterator[None]:
    """Within, every attention through transformers' interface is handed to `observe` with its operands."""
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface

    def get_interface(self: Any, implementation: Any, default: Any) -> Any:
        attend = original(self, implementation, default)

        def observed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return observe(module, query, key, value, lambda: attend(module, query, key, value, *args, **kwargs))

        return observed

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within, every module is in evaluation mode; afterwards each is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def rotates(model: Any) -> bool:
    """Whether keys are rotated by their position, which then may be any number, and the model can be told which."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "rope_parameters", None) is not None and "position_ids" in _accepted(model)


def is_decoder(model: Any) -> bool:
    """Whether the model is one decoder, which takes a cache, without an encoder."""
    return is_pretrained(model) and "past_key_values" in _accepted(model) and not model.config.is_encoder_decoder


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's forward has such an argument."""
    return argument in _accepted(model)


def _accepted(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def without_cache(model: Any) -> dict[str, bool]:
    """The argument that keeps a forward from making a cache, where there is one."""
    return {"use_cache": False} if "use_cache" in _accepted(model) else {}


def keys_and_values(
    model: Any, attentions: Mapping[str, nn.Module], batch: Mapping[str, Any], first: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The keys and values of one forward at each of the attention modules, call by call.

    `first` is the position of the first token, where a model rotates keys by positions and the batch names none.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in attentions}
    paths = {module: path for path, module in attentions.items()}

    def observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, run: Callable[[], Any]) -> Any:
        if module in paths:
            found[paths[module]].append((key, value))
        return run()

    given = dict(batch)
    if rotates(model) and "position_ids" not in given:
        rows, length = given["input_ids" if "input_ids" in given else "inputs_embeds"].shape[:2]
        positions = torch.arange(first, first + length, device=next(model.parameters()).device)
        given["position_ids"] = positions.expand(rows, -1)
    with observed_attention(observe):
        model(**given, **without_cache(model))
    return found


def kept_in_float32(model: Any) -> Callable[[str], bool]:
    """Whether transformers keeps the module of a path in float32 whatever is asked for, and never quantizes it."""
    patterns = list(model._keep_in_fp32_modules or ()) if is_pretrained(model) else []
    if not patterns:
        return lambda path: False
    from transformers.quantizers.quantizers_utils import should_convert_module

    return lambda path: not should_convert_module(path, patterns)


def note_quantized(model: Any) -> None:
    """Say in a transformers model's config which of its linears are in NF4, so that its folder loads as such.

    The words are bitsandbytes', whose checkpoint keys a `Holder` has.
    """
    if not is_pretrained(model):
        return
    packed = [facts for _, m in site.base_modules(model) if isinstance(m, Holder) for facts in m.facts.values()]
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(facts.double_quant for facts in packed),
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _dense_linears(model),
    }


def note_dense(model: Any) -> None:
    """Bring up to date which linears of a model that says it is in bitsandbytes' 4 or 8 bits are dense."""
    noted: Any = getattr(model.config, "quantization_config", None) if is_pretrained(model) else None
    said = noted if isinstance(noted, dict) or noted is None else vars(noted)
    if said is not None and "llm_int8_skip_modules" in said:
        said["llm_int8_skip_modules"] = _dense_linears(model)


def _dense_linears(model: nn.Module) -> list[str]:
    found = ((path, formats.of(module)) for path, module in site.base_modules(model))
    return [path for path, form in found if isinstance(form, (dense.Linear, dense.Conv1D)) and not form.quantized]


def forget_quantization(model: Any) -> None:
    """Take off what is noted on a model that was loaded quantized, so that transformers takes it for a plain one."""
    if not is_pretrained(model):
        return
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        for module in model.modules():
            if is_pretrained(module):
                module.config._is_quantized = False


def tokenized(name: str, texts: list[str]) -> dict[str, Tensor] | None:
    """Texts as a batch for the model of this folder or Hub id; None where it has no tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch: dict[str, Tensor] = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
    return batch


def language_model(name: str) -> nn.Module:
    """A causal language model in the dtype it is stored in; FileError where there is none."""
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileError(f"{name} cannot be loaded as a causal language model: {reason}") from None
    return model


def save_language_model(model: Any, source: str | None, folder: Path, as_read: bool = True) -> None:
    """Write a model, with the tokenizer of its source where it has one, into a folder that appears when it is whole.

    `as_read` joins and cuts weights for the file as the models of this kind have them there.
    """
    from transformers import AutoTokenizer

    with files.appearing(folder) as partial:
        model.save_pretrained(partial, save_original_format=as_read)
        if source is None:
            return
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        except (OSError, ValueError) as error:
            print(f"veneer: {source} has no tokenizer to copy ({str(error).splitlines()[0]})", file=sys.stderr)
