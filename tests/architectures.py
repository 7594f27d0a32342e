"""A tiny random model of every architecture that transformers has an auto class for.

The default config of a model type is shrunk by rules on the names of its sizes; `ODD` mends the few whose sizes must
fit one another in ways that no name tells.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

WIDTH, VOCABULARY = 64, 128

# What an attribute that matches is made, where its default is larger.
SIZES = [
    (VOCABULARY, r"(\w+_)?vocab_size(_\w+)?|n_tokens"),
    (WIDTH, r"((decoder|encoder|out|cross_attention|attention|fpn|visual)_)?hidden_size(_per_layer_input)?"
            r"|(encoder_|decoder_|emb_|text_|vision_|word_)?(embed|emb)(ed|edding)?(_proj)?_(dim|size)|d_model|n_embd|dim|width"
            r"|(model|hidden|projection|encoder|decoder|vision_feature|visual_feat)_dim|d_embed|feature_size|hidden_channels|n_state"),
    (96, r"\w*intermediate_size\w*|\w*ffn_dim\w*|\w*ffn_hidden_size|d_ff|d_inner|n_inner|dim_feedforward"
         r"|(mlp|ff|(en|de)coder_feedforward)_dim|feedforward_size|mlp_hidden_size"),
    (4, r"\w*attention_heads(_\w+)?|n_heads?|num_heads|num_query_heads|(en|de)coder_num_heads|nhead"),
    (2, r"\w*num_key_value_heads|n_kv_heads|num_kv_heads|multi_query_group_num"),
    (16, r"(attention_|attn_|global_|swa_|indexer_|linear_key_|linear_value_|qk_nope_|qk_rope_|v_)?head_dim|d_kv|d_head"
         r"|kv_channels|mamba_(d_state|state_size|d_head|head_dim)|(ssm_)?state_size"),
    (2, r"\w*_layers|n_layer|num_blocks|n_blocks?|(encoder_|decoder_)?depth"),
    (4, r"\w*num_experts|n_routed_experts|num_local_experts"),
    (2, r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k"),
    (1, r"(n|num|moe_num)_shared_experts|n_group|topk_group|num_expert_groups?"),
    (32, r"(q|kv)_lora_rank"),
    (80, r"num_mel_bins|n_mels"),
    (8, r"num_queries|num_query_tokens|num_latents|mamba_(n_heads|num_heads)|rotary_dim"),
]  # fmt: skip
KEPT = (
    r"num_channels|\w*_token_(id|index)|num_feature_levels|num_labels|max_position_embeddings|\w*dropout\w*"
    r"|first_k_dense_replace|fpn_num_layers|num_fpn_layers|num_adapter_layers|num_feat_extract_layers|num_ctc_classes"
    r"|num_hidden_layers_to_\w+|(return|conv|positional|output|adapter|backbone|tdnn|xvector|mtp|num_mtp|use)_\w*"
    r"|mlp_only_layers|(vision_)?feature_layer\w*|\w*_indices|num_nextn_predict_layers|cross_attention_layers"
    r"|hybrid_layer_ids|num_kv_shared_layers"
)
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "layers_type")

STAGES = {"num_heads": [4] * 4, "depths": [1] * 4}
SERIES = {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2}
HYBRID = {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
ODD: dict[str, dict[str, Any]] = {
    "bamba": {**HYBRID, "attn_layer_indices": [1]},
    "bros": {"dim_bbox_projection": 16},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.hidden_size": WIDTH,
        "ffn_config.ffn_hidden_size": 96,
        "ffn_config.moe_num_experts": 4,
        "ffn_config.moe_top_k": 2,
    },
    "deepseek_v2": EXPERTS,
    "deepseek_v3": {"first_k_dense_replace": 1},
    "donut-swin": STAGES,
    "dots1": {**EXPERTS, "n_shared_experts": 1},
    "dots3_note": {"pad_token_id": 0, "text_config.head_dim": 64},
    "dots3_note_text": {"head_dim": 64},
    "emu3": {"pad_token_id": 0},
    "encodec": {"codebook_dim": WIDTH},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "ssm_multipliers": [1.0] * 5,
        "mlp_multipliers": [1.0] * 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        **HYBRID,
        "layer_types": ["mamba", "full_attention"],
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 96},
    "llama4": {"pad_token_id": 0},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8},
    "maskformer-swin": STAGES,
    "ministral": {"head_dim": 16},
    "mistral4": {"head_dim": 32, "qk_head_dim": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 4},
    "patchtsmixer": SERIES,
    "patchtst": SERIES,
    "qwen3_5": {"vocab_size": VOCABULARY},
    "qwen3_5_moe": {"vocab_size": VOCABULARY},
    "qwen4_exp": {"vocab_size": VOCABULARY},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_window_size": 16,
        "layer_types": ["recurrent", "recurrent", "attention"],
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "swin2sr": {"num_heads": [4, 4], "depths": [2, 2]},
    "swinv2": STAGES,
    "wav2vec2-bert": {"vocab_size": 40},
    "wav2vec2-conformer": {"vocab_size": 40},
}

# The kinds of head, the most telling first; an encoder of text is best seen with its masked head.
HEADS = (
    *("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM"),
    *("IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "OBJECT_DETECTION"),
    *("SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "PRETRAINING"),
)
BOTH_MASKED_AND_CAUSAL = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES) - {"bart", "mbart", "mvp", "reformer"}


def types() -> list[str]:
    """Every model type with an auto class, in alphabetic order."""
    return sorted({name for kind in _mappings() for name in kind if name in CONFIG_MAPPING})


def kind(model_type: str) -> tuple[type, str]:
    """The class to build for a model type, and the kind of head it has ("" for none)."""
    heads = ("MASKED_LM", *HEADS) if model_type in BOTH_MASKED_AND_CAUSAL else HEADS
    for head in (*heads, ""):
        names = vars(modeling_auto)[f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES"]
        name = names.get(model_type, "")
        name = name[0] if isinstance(name, (tuple, list)) else name
        if name and hasattr(transformers, name):
            return getattr(transformers, name), head
    raise LookupError(f"transformers has no model class for {model_type}")


def config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type, made tiny."""
    series = {"prediction_length": 4} if model_type in ("autoformer", "informer", "time_series_transformer") else {}
    tiny = copy.deepcopy(CONFIG_MAPPING[model_type](**series))
    _shrink(tiny)
    for path, value in ODD.get(model_type, {}).items():
        owner, _, name = path.rpartition(".")
        _set(getattr(tiny, owner) if owner else tiny, name, copy.copy(value))
    return tiny


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode, with random weights."""
    cls, _ = kind(model_type)
    torch.manual_seed(seed)
    tiny = config(model_type)
    if not isinstance(tiny, cls.config_class):  # a model of text that is built from the config of text and images
        try:
            return _built(cls, tiny.get_text_config())
        except AttributeError:  # or one of both, with the class of another model type
            pass
    return _built(cls, tiny)


def _built(cls: Any, tiny: PreTrainedConfig) -> nn.Module:
    try:
        model = cls._from_config(copy.deepcopy(tiny), attn_implementation="sdpa")
    except ValueError as error:
        if "atten" not in str(error):
            raise
        model = cls._from_config(tiny, attn_implementation="eager")
    return model.eval()


def _mappings() -> list[dict[str, Any]]:
    names = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS]
    return [vars(modeling_auto)[name] for name in ("MODEL_MAPPING_NAMES", *names)]


def _shrink(tiny: PreTrainedConfig, depth: int = 0) -> None:
    heads = next((n for k in ("num_attention_heads", "n_head", "num_heads", "n_heads") if (n := _int(tiny, k))), None)
    for name, value in list(vars(tiny).items()):
        if isinstance(value, PreTrainedConfig) and depth < 4:
            _shrink(value, depth + 1)
        elif type(value) is int and not name.startswith("_") and not re.fullmatch(KEPT, name):
            size = next((size for size, pattern in SIZES if re.fullmatch(pattern, name)), value)
            if "key_value_heads" in name and value == heads:
                size = 4  # as many as there are queries
            if value > size:
                _set(tiny, name, size)
    if isinstance(vars(tiny).get("num_heads"), (list, tuple)) and "depths" in vars(tiny):
        tiny.num_heads, tiny.depths = [4] * len(tiny.num_heads), [2] * len(tiny.depths)
    _few_kinds_of_layers(tiny)
    heads = _int(tiny, "num_attention_heads")
    if "head_dim" in vars(tiny) and vars(tiny)["head_dim"] is None and heads:
        _set(tiny, "head_dim", _int(tiny, "hidden_size") // heads)
    for name in ("rope_parameters", "rope_scaling"):
        _fit_rotary(tiny, vars(tiny).get(name))
    _known_tokens(tiny)


def _set(tiny: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(tiny, name, value)
    except (AttributeError, ValueError, TypeError):  # a property, or checked against what is not yet shrunk
        vars(tiny)[name] = value


def _int(tiny: PreTrainedConfig, name: str) -> int:
    value = vars(tiny).get(name, 0)
    return value if type(value) is int else 0


def _few_kinds_of_layers(tiny: PreTrainedConfig) -> None:
    """Lists with an entry a layer: each kind of layer once, and as many layers as there are kinds."""
    layers = next((n for name in DEPTH if (n := _int(tiny, name))), 0)
    for name, value in list(vars(tiny).items()):
        if not isinstance(value, (list, tuple)) or not layers or len(value) <= layers:
            continue
        if name in LAYER_KINDS:
            kinds = list({str(item): item for item in value}.values())
            kinds += [value[0]] * (layers - len(kinds))
            for depth in DEPTH[:4]:
                if len(kinds) > layers and _int(tiny, depth):
                    _set(tiny, depth, len(kinds))
            layers = max(layers, len(kinds))
            _set(tiny, name, kinds)
        elif re.search(r"no_rope|is_moe|moe_layers|_list$|sparsity_pattern|intermediate_size|key_value_heads", name):
            _set(tiny, name, list(value)[:layers])
    sizes = vars(tiny).get("intermediate_size")
    if isinstance(sizes, list):
        tiny.intermediate_size = [min(size, 96) for size in sizes]


def _fit_rotary(tiny: PreTrainedConfig, rotary: Any) -> None:
    """Multimodal rotary sections that add up to half a head."""
    if not isinstance(rotary, dict):
        return
    for inner in rotary.values():
        _fit_rotary(tiny, inner)
    if "rope_type" not in rotary and "mrope_section" not in rotary:
        return
    heads = _int(tiny, "num_attention_heads")
    head = _int(tiny, "head_dim") or (_int(tiny, "hidden_size") // heads if heads else 0) or 16
    share = rotary.get("partial_rotary_factor") or vars(tiny).get("partial_rotary_factor") or 1.0
    half = int(head * share) // 2
    sections = rotary.get("mrope_section")
    if sections is None and re.search(r"glm|vl|omni|ocr", tiny.model_type):
        sections = [1, 1, 1]
    if sections is not None:
        first = [half // len(sections)] * (len(sections) - 1)
        rotary["mrope_section"] = [*first, half - sum(first)]


def _known_tokens(tiny: PreTrainedConfig) -> None:
    """Special tokens inside the small vocabulary, each another."""
    size = vars(tiny).get("vocab_size")
    if type(size) is not int:
        return
    free = size - 1
    for name, value in sorted(vars(tiny).items()):
        if not name.endswith(("_token_id", "_token_index")) or type(value) not in (int, list):
            continue
        if max([value] if isinstance(value, int) else [0, *filter(None, value)]) >= size:
            _set(tiny, name, free if isinstance(value, int) else [free])
            free -= 1
