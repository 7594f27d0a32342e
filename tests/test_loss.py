"""The loss in chunks: the model's own in value and gradients, a fraction of its memory, and undone without a trace."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import veneer
from veneer.errors import LossError
from veneer.ops.loss import chunk_length, summed_cross_entropy

VOCABULARY = 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # tied
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {"num_local_experts": 2, "output_router_logits": True},  # adds the routers' loss
}
HEADS = {
    "frozen": {"where": "linear"},
    "adapted": {"where": "linear | head"},
    "trained": {"where": "linear", "also_train": ["lm_head"]},
}


def make(family="llama", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **options})
    return AutoModelForCausalLM.from_config(config).train()


def adapted(family="llama", head="frozen", **options):
    model = make(family, **options)
    adapter = veneer.attach(model, veneer.LoRA(rank=2), **HEADS[head])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def batch(rows=3, length=11):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def results(model, **given):
    loss = model(**{**batch(), **given}).loss
    learned = [each for each in model.parameters() if each.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, learned, materialize_grads=True)]


def same(ours, plain, tolerance=1e-5):
    assert len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


# --- the arithmetic


@pytest.mark.parametrize("tokens", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chunks_add_up(tokens, dtype):
    torch.manual_seed(0)
    hidden, labels = torch.randn(7, 5, dtype=dtype, requires_grad=True), torch.randint(13, (7,))
    weight, bias = torch.randn(13, 5, dtype=dtype, requires_grad=True), torch.randn(13, dtype=dtype, requires_grad=True)
    whole = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")
    chunked = summed_cross_entropy(hidden, labels, lambda x: F.linear(x, weight, bias), tokens)
    for one, other in ((chunked, whole), *zip(*(
        torch.autograd.grad(3 * loss, [hidden, weight, bias]) for loss in (chunked, whole)), strict=True)):  # fmt: skip
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


def test_extreme_logits_stay_numbers():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    loss = summed_cross_entropy(hidden, torch.tensor([2, 2]), lambda x: x @ weight.T, 1)
    assert loss == 2e4
    assert torch.autograd.grad(loss, hidden)[0].tolist() == [[2.0], [0.0]]


def test_nothing_to_learn_is_zero_and_connected():
    hidden = torch.randn(0, 5, requires_grad=True)
    loss = summed_cross_entropy(hidden, torch.empty(0, dtype=torch.int64), lambda x: x, 4)
    assert loss == 0
    assert torch.autograd.grad(loss, hidden)[0].shape == (0, 5)


def test_a_second_gradient_is_refused():
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5)
    loss = summed_cross_entropy(hidden, torch.zeros(4, dtype=torch.int64), lambda x: x @ weight.T, 2)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


class Live(TorchDispatchMode):
    """The most bytes that tensors made within held at once."""

    def __init__(self, *before):
        super().__init__()
        self.now = self.peak = 0
        self.known = {each.untyped_storage()._cdata for each in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.add(each.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_a_sliver_of_the_stock_loss(dtype):
    tokens, vocabulary, width = 4096, 128 * 1024, 2048
    hidden = torch.empty(tokens, width, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(vocabulary, width, dtype=dtype, device="meta")
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Live(hidden, weight, labels) as ours:
        chunk = chunk_length(vocabulary)
        summed_cross_entropy(hidden, labels, lambda x: F.linear(x, weight), chunk).backward()
    with Live(hidden, weight, labels) as stock:
        F.cross_entropy(F.linear(hidden, weight).float(), labels).backward()
    assert ours.peak <= 0.05 * stock.peak
    size = hidden.element_size()
    logits = chunk * vocabulary * (2 * 4 + (size if size < 4 else 0))
    # the logits of a chunk with their float32 copy and gradient, and the gradient of the hidden states, twice at most
    assert ours.peak <= logits + 2 * hidden.nbytes + chunk * width * size + 2**20


# --- on a model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_models_own_loss(family, head):
    model = adapted(family, head)
    wanted = results(model), results(model, num_items_in_batch=torch.tensor(40)), results(model, num_items_in_batch=7)
    with veneer.chunk_loss(model, tokens=4):
        same(results(model), wanted[0])
        same(results(model, num_items_in_batch=torch.tensor(40)), wanted[1])
        same(results(model, num_items_in_batch=7), wanted[2])
    same(results(model), wanted[0], tolerance=0)


def test_a_tied_table_that_learns_as_a_head():
    model = make("gpt2")
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    wanted = results(model)
    veneer.chunk_loss(model, tokens=4)
    same(results(model), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_head(dtype):
    model = make(hidden_size=64).to(dtype)
    veneer.quantize(model, veneer.NF4(), where="linear | head")
    veneer.attach(model, veneer.LoRA(rank=2), where="linear | head")
    wanted = results(model)
    veneer.chunk_loss(model, tokens=4)
    same(results(model), wanted, tolerance=1e-5 if dtype == torch.float32 else 0.05)


def test_a_masked_language_model():
    torch.manual_seed(0)
    sizes = {**SIZES, "cls_token_id": 1, "sep_token_id": 2}
    model = ModernBertForMaskedLM(ModernBertConfig(**sizes))
    wanted = results(model)
    with veneer.chunk_loss(model, tokens=4):
        same(results(model), wanted)


def test_labels_that_are_shifted_already_and_positional():
    model, given = adapted(), batch()
    shifted = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    veneer.chunk_loss(model, tokens=4)
    wanted = model(**given).loss
    assert torch.equal(model(**given, shift_labels=shifted).loss, wanted)
    assert torch.equal(model(given["input_ids"], None, None, None, None, given["labels"]).loss, wanted)


def test_it_says_where_labels_and_tokens_part():
    model, given = adapted(), batch()
    veneer.chunk_loss(model)
    with pytest.raises(LossError, match=r"labels for \(3, 10\) tokens, and its head was called with \(3, 11\)"):
        model(given["input_ids"], labels=given["labels"][:, 1:])
    model(**given).loss.backward()  # the failed forward has left nothing behind


def test_an_empty_stand_in_for_the_logits_and_the_whole_where_no_loss_is_asked():
    model, given = adapted(), batch()
    veneer.chunk_loss(model)
    assert model(**given).logits.shape == (3, 0, VOCABULARY)
    assert model(input_ids=given["input_ids"]).logits.shape == (3, 11, VOCABULARY)
    with torch.no_grad():
        assert model.eval()(**given).loss > 0


def test_rows_of_their_own_on_the_head_get_the_plain_loss():
    model = adapted(head="adapted")
    other = veneer.attach(model, veneer.LoRA(rank=2), where="head", name="other")
    nn.init.normal_(next(other.parameters()))
    veneer.activate(model, rows=["default", "other", None])
    wanted = results(model)
    veneer.chunk_loss(model, tokens=4)
    same(results(model), wanted, tolerance=0)


def test_what_an_adapter_does_after_the_trial_is_in_the_loss():
    model = make()
    veneer.chunk_loss(model, tokens=4)
    adapter = veneer.attach(model, veneer.DoRA(rank=2), where="head | mlp.down")
    nn.init.normal_(dict(adapter.named_parameters())[next(n for n, _ in adapter.named_parameters())], std=0.2)
    ours, before = results(model), model.loss_function
    model.loss_function.remove()
    assert not isinstance(model.loss_function, type(before))
    same(ours, results(model))


def test_removed_it_leaves_no_trace():
    model = adapted()
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks), len(model.lm_head._forward_pre_hooks)
    keys, names = set(vars(model)), list(model.state_dict())
    veneer.chunk_loss(model).remove()
    assert (len(model._forward_hooks), len(model._forward_pre_hooks), len(model.lm_head._forward_pre_hooks)) == hooks
    assert set(vars(model)) == keys
    assert list(model.state_dict()) == names


def test_a_copy_computes_its_own():
    model = adapted("gemma2")
    veneer.chunk_loss(model, tokens=4)
    wanted = results(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.loss_function.head is other.lm_head
        same(results(other), wanted, tolerance=0)
        other.loss_function.remove()
        same(results(other), wanted)


def test_blocks_that_are_recomputed():
    model = adapted()
    wanted = results(model)
    veneer.chunk_loss(model, tokens=4)
    veneer.checkpoint_activations(model)
    same(results(model), wanted)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_trains_the_same(accumulate, tmp_path):
    ids = batch(8)["input_ids"]
    rows = [{"input_ids": row, "labels": torch.where(torch.arange(11) < n, -100, row)} for n, row in enumerate(ids)]
    losses = []
    for chunked in (False, True):
        model = adapted()
        if chunked:
            veneer.chunk_loss(model, tokens=4)
        options = {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "logging_steps": 1,
        }
        args = TrainingArguments(str(tmp_path), **options, gradient_accumulation_steps=accumulate, learning_rate=0.05,
                                 use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([*(row["loss"] for row in trainer.state.log_history if "loss" in row),
                       trainer.evaluate()["eval_loss"]])  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- what is refused


class Tilted(nn.Linear):
    """A head that treats later tokens differently, so that tokens are not each for themselves."""

    def forward(self, x):
        return super().forward(x) * torch.arange(1.0, 1 + x.shape[1])[None, :, None]


def test_a_head_that_mixes_tokens_is_found_out():
    model = make()
    model.lm_head = Tilted(32, VOCABULARY, bias=False)
    with pytest.raises(LossError, match="in chunks is not its own: the loss of a trial differs"):
        veneer.chunk_loss(model)
    assert "_loss_function" not in vars(model)
    assert not model.lm_head._forward_pre_hooks


def test_other_losses_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1,
                                             num_heads=4, decoder_start_token_id=0))  # fmt: skip
    with pytest.raises(LossError, match="T5ForConditionalGeneration computes its loss in its own forward"):
        veneer.chunk_loss(t5)
    with pytest.raises(LossError, match="WhisperForConditionalGeneration reads no token ids, on which a loss is tried"):
        veneer.chunk_loss(tiny.FAMILIES["whisper"].model())
    sizes = {key: SIZES[key] for key in list(SIZES)[:5]}
    with pytest.raises(LossError, match="has no head over a vocabulary"):
        veneer.chunk_loss(BertForSequenceClassification(BertConfig(**sizes)))
    model = make()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    with pytest.raises(LossError, match="has a loss_function of its own kind"):
        veneer.chunk_loss(model)
    model = make()
    veneer.chunk_loss(model)
    with pytest.raises(LossError, match="is in chunks already"):
        veneer.chunk_loss(model)
