"""What servers do not take of PEFT's files, as `scripts/check_servers.py` watched it in their own code.

vLLM 0.33.0, SGLang 0.5.23 and llama.cpp as of llama-cpp-python 0.3.36 were run; none is needed here.
"""

import pytest
import torch

from veneer.interop.servers import findings

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
LAYER = "base_model.model.model.layers.0"
SERVERS = ("vllm", "sglang", "llama.cpp")


def factors(*paths):
    return {f"{path}.lora_{factor}.weight": torch.zeros(2, 2) for path in paths for factor in "AB"}


def attention(*names):
    return factors(*[f"{LAYER}.self_attn.{name}_proj" for name in names])


def mlp(*names):
    return factors(*[f"{LAYER}.mlp.{name}_proj" for name in names])


QV = attention("q", "v")
EMBEDDING = {f"base_model.model.model.embed_tokens.lora_embedding_{factor}": torch.zeros(2, 2) for factor in "AB"}
UP, DOWN = factors(f"{LAYER}.mlp.experts.base_layer"), factors(f"{LAYER}.mlp.experts")
SCORE = {"base_model.model.score.weight": torch.zeros(3, 2)}
HEAD = {"base_model.model.lm_head.weight": torch.zeros(3, 2)}
NORM = {f"{LAYER}.input_layernorm.weight": torch.zeros(2)}
LAST_NORM = {"base_model.model.model.norm.weight": torch.zeros(2)}
BIAS = {f"{LAYER}.self_attn.q_proj.base_layer.bias": torch.zeros(2)}
OTHER_BIAS = {f"{LAYER}.self_attn.o_proj.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("options", "tensors", "kinds"),
    [
        ({}, QV, ("", "", "")),
        ({"r": 17}, QV, ("setting", "", "")),
        ({"r": 513}, QV, ("refused", "", "")),
        ({"rank_pattern": {"v_proj": 17}}, QV, ("setting", "refused", "")),
        ({"alpha_pattern": {"v_proj": 7}}, QV, ("", "wrong", "wrong")),
        ({"use_rslora": True}, QV, ("", "wrong", "wrong")),
        ({"use_dora": True}, QV, ("refused", "refused", "refused")),
        ({"peft_type": "VERA"}, QV, ("refused", "refused", "refused")),
        ({"init_lora_weights": "pissa_niter_4"}, QV, ("refused", "wrong", "wrong")),
        ({"init_lora_weights": "gaussian"}, QV, ("", "", "")),
        ({"modules_to_save": ["lm_head"]}, QV | HEAD, ("refused", "wrong", "refused")),
        ({"modules_to_save": ["classifier", "score"]}, QV | SCORE, ("", "wrong", "refused")),
        ({"modules_to_save": ["score", "lm_head"]}, QV | SCORE | HEAD, ("refused", "wrong", "refused")),
        ({"modules_to_save": ["input_layernorm"]}, QV | NORM, ("refused", "refused", "wrong")),
        ({"modules_to_save": ["model.norm"]}, QV | LAST_NORM, ("refused", "wrong", "wrong")),
        ({"bias": "lora_only"}, QV | BIAS, ("refused", "wrong", "refused")),
        ({"bias": "all"}, QV | BIAS | OTHER_BIAS, ("refused", "refused", "refused")),
        ({"layer_replication": [[0, 2], [1, 2]]}, QV, ("refused", "refused", "refused")),
        ({"alora_invocation_tokens": [3]}, QV, ("refused", "wrong", "")),
        ({"target_modules": r".*\.(q|v)_proj"}, QV, ("", "refused", "")),
        ({"target_modules": "all-linear"}, QV, ("", "", "")),
        ({}, attention("q"), ("", "refused", "")),
        ({}, attention("q", "k"), ("", "refused", "")),
        ({}, attention("k", "v"), ("", "refused", "")),
        ({}, attention("q", "k", "v", "o"), ("", "", "")),
        ({}, mlp("gate", "down"), ("", "", "")),
        ({}, mlp("up", "down"), ("", "refused", "")),
        ({}, QV | EMBEDDING, ("", "", "setting")),
        ({}, QV | factors("base_model.model.lm_head"), ("", "", "setting")),
        ({"target_parameters": ["experts.gate_up_proj"]}, QV | UP | DOWN, ("setting", "refused", "refused")),
        ({"target_parameters": ["experts.down_proj"]}, QV | DOWN, ("refused", "refused", "refused")),
    ],
)
def test_the_gravest_thing_that_a_server_does(options, tensors, kinds):
    for server, kind in zip(SERVERS, kinds, strict=True):
        found = [one.kind for one in findings(PLAIN | options, tensors, server) if "Its rank is 2" not in one.what]
        if server == "sglang":  # a rank is always a setting there
            found = [one for one in found if one != "setting"]
        assert sorted(set(found)) == ([kind] if kind else []), (server, found)


def test_peft_takes_its_own():
    for options in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}):
        assert findings(PLAIN | options, QV, "peft") == []
    starts = {"pissa": [], "olora": [], "pissa_niter_4": ["wrong"], "gaussian": []}
    for start, kinds in starts.items():
        assert [one.kind for one in findings(PLAIN | {"init_lora_weights": start}, QV, "peft")] == kinds


def test_what_vllm_has_to_be_started_with_is_named():
    (found,) = findings(PLAIN | {"rank_pattern": {"q_proj": 65}}, QV, "vllm")
    assert "--max-lora-rank 128" in found.way_out
    (found,) = findings(PLAIN | {"target_parameters": ["experts.gate_up_proj"]}, UP | DOWN, "vllm")
    assert "--enable-mixed-moe-lora-format" in found.way_out
    assert "is_3d_lora_weight" in found.way_out
