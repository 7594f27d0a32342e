"""What adapters keep for backward, in bytes by unique storage: exact, against peft and the frozen model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import veneer

LAYERS, TOKENS, HIDDEN, INNER, KEYS, RANK = 2, 2 * 16, 48, 128, 16, 4
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(TOKENS).view(2, -1)


def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    config = LlamaConfig(**sizes, num_attention_heads=HIDDEN // 8, num_key_value_heads=KEYS // 8)
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).train()


def kept(model, embeddings=None):
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dim():  # not the seeds of dropout, eight bytes each
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS) if embeddings is None else model(inputs_embeds=embeddings, labels=IDS)
    return sum(storages.values())


def frozen():
    base = model()
    return kept(base, base.get_input_embeddings()(IDS).detach().requires_grad_())


def ours(method):
    base = model()
    veneer.attach(base, method)
    return kept(base)


def theirs(**options):
    peft = pytest.importorskip("peft")
    return kept(peft.get_peft_model(model(), peft.LoraConfig(r=RANK, target_modules=SEVEN, **options)))


def test_lora_keeps_the_inputs_of_norms_and_products_once_with_dropout_or_without():
    """Beyond the frozen model: the input of q, k and v, that of gate and up, that of down; and A(x)."""
    inputs = 2 * TOKENS * (2 * HIDDEN + INNER)
    hidden = 2 * TOKENS * RANK * len(SEVEN)
    embedded = 4 * TOKENS * HIDDEN + 4 * TOKENS  # what the first norm keeps where the embeddings want a gradient
    for p in (0.0, 0.05):
        assert ours(veneer.LoRA(rank=RANK, dropout=p)) - frozen() == LAYERS * (inputs + hidden) - embedded


def test_lora_fa_keeps_no_input_at_all():
    added = ours(veneer.LoRAFA(rank=RANK)) - frozen()
    assert added <= LAYERS * 2 * TOKENS * RANK * len(SEVEN)


def test_dora_keeps_its_answers_and_not_the_base_s():
    """Those of gate and up are kept by what follows anyway; q, k, o and down are left, and v, which attention keeps."""
    answers = 2 * TOKENS * (3 * HIDDEN + 2 * KEYS)
    added = ours(veneer.DoRA(rank=RANK)) - ours(veneer.LoRA(rank=RANK))
    small = 4 * LAYERS * 2 * (2 * HIDDEN + 2 * HIDDEN + 2 * KEYS + 2 * INNER)  # the lengths
    assert 0 < added <= LAYERS * answers + small


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks transformers for it
@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        (veneer.LoRA(rank=RANK), {}, 0.66),
        (veneer.LoRA(rank=RANK, dropout=0.05), {"lora_dropout": 0.05}, 0.45),
        (veneer.DoRA(rank=RANK), {"use_dora": True}, 0.40),
        (veneer.DoRA(rank=RANK, dropout=0.05), {"use_dora": True, "lora_dropout": 0.05}, 0.40),
    ],
)
def test_it_is_that_part_of_what_peft_keeps(method, options, most):
    assert ours(method) <= most * theirs(**options)


def test_dropout_of_a_bottleneck_keeps_no_mask():
    width = {"width": 8, "activation": "gelu"}
    assert ours(veneer.BottleneckAdapter(**width, dropout=0.1)) == ours(veneer.BottleneckAdapter(**width))
