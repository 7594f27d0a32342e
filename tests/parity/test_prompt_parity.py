"""Prompt tuning and P-tuning compute what Hugging Face PEFT's compute, and either reads the other's files."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import FAMILIES, IDS, SIZES, TOKENS, VOCABULARY, perturb
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import veneer

with warnings.catch_warnings():
    # peft imports every quantizer it finds, and some of those warn at import that they lack a kernel or a compiler
    warnings.simplefilter("ignore")
    import peft

pytestmark = [
    # peft asks transformers' models for a property that transformers has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

LENGTH = 3


def seeded(build, config) -> nn.Module:
    torch.manual_seed(0)
    return build(config).double().eval()


def classifier() -> nn.Module:
    return seeded(
        LlamaForSequenceClassification,
        LlamaConfig(vocab_size=VOCABULARY, num_labels=3, num_key_value_heads=2, **SIZES, **TOKENS),
    )


def tagger() -> nn.Module:
    return seeded(BertForTokenClassification, BertConfig(vocab_size=VOCABULARY, num_labels=3, **SIZES))


CASES = {
    "llama": ("CAUSAL_LM", FAMILIES["llama"].model, ()),
    "gpt2": ("CAUSAL_LM", FAMILIES["gpt2"].model, ()),
    "t5": ("SEQ_2_SEQ_LM", FAMILIES["t5"].model, ()),
    "llama-classifier": ("SEQ_CLS", classifier, ("score",)),
    "bert-tagger": ("TOKEN_CLS", tagger, ("classifier",)),
}


def batch(task: str) -> dict[str, Tensor]:
    """Two rows of six tokens, the second with padding on the right where PEFT can take it."""
    ids, mask = IDS[:2].clone(), torch.ones_like(IDS[:2])
    if task != "SEQ_CLS":  # without ids PEFT's classifier reads the last position, be it padding or not
        ids[1, 4:], mask[1, 4:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "TOKEN_CLS":  # PEFT does not lengthen the labels of a tagger
        return inputs
    labels = torch.tensor([0, 2]) if task == "SEQ_CLS" else IDS[:2].clone()
    if task == "CAUSAL_LM":  # PEFT counts the first token, which the prompt predicts, into the loss
        labels[:, 0] = -100
    return {**inputs, "labels": labels}


def answers(model: nn.Module, task: str) -> tuple[Tensor, Tensor]:
    """Logits at the tokens, and the loss."""
    output = model(**batch(task))
    shown = batch(task)["attention_mask"].bool()
    logits = output.logits
    if task in ("CAUSAL_LM", "TOKEN_CLS"):
        logits = logits[:, -IDS.shape[1] :][shown]
    return logits, logits.new_zeros(()) if output.loss is None else output.loss


def config(task: str, **options) -> peft.PromptTuningConfig | peft.PromptEncoderConfig:
    kind = peft.PromptEncoderConfig if options else peft.PromptTuningConfig
    return kind(task_type=task, num_virtual_tokens=LENGTH, **options)


def theirs_and_ours(case: str) -> tuple[nn.Module, nn.Module, veneer.Adapter]:
    task, build, whole = CASES[case]
    theirs, ours = peft.get_peft_model(build(), config(task)).double().eval(), build()
    adapter = veneer.attach(ours, veneer.PromptTuning(LENGTH), also_train=whole)
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight[:LENGTH] = adapter.claims[0].delta.embeddings
    return theirs, ours, adapter


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * max(1.0, float(expected.detach().abs().max())))


@pytest.mark.parametrize("case", CASES)
def test_equal_numbers_give_equal_answers_and_gradients(case):
    task = CASES[case][0]
    theirs, ours, adapter = theirs_and_ours(case)
    (expected, their_loss), (logits, loss) = (answers(model, task) for model in (theirs, ours))
    close(logits, expected)
    torch.testing.assert_close(
        loss.detach(), their_loss.detach(), rtol=1e-6, atol=0
    )  # transformers computes it in float32
    for answer in (logits, expected):
        answer.pow(2).mean().backward()
    close(adapter.claims[0].delta.embeddings.grad, theirs.prompt_encoder.default.embedding.weight.grad[:LENGTH])


@pytest.mark.parametrize("case", CASES)
def test_peft_opens_our_file(case, tmp_path):
    task, build, whole = CASES[case]
    ours = build()
    adapter = veneer.attach(ours, veneer.PromptTuning(LENGTH), also_train=whole)
    perturb(adapter)
    with torch.no_grad():
        adapter.claims[0].delta.embeddings.copy_(adapter.claims[0].delta.embeddings.float())  # PEFT rounds it so
    veneer.save(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).double().eval()
    with torch.no_grad():
        close(answers(theirs, task)[0], answers(ours, task)[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("encoder", ["", "MLP", "LSTM"])
def test_we_open_the_file_of_peft(case, encoder, tmp_path):
    task, build, _ = CASES[case]
    options = {"encoder_reparameterization_type": encoder, "encoder_hidden_size": 5} if encoder else {}
    torch.manual_seed(5)
    theirs = peft.get_peft_model(build(), config(task, **options)).double().eval()
    with torch.no_grad():
        expected = answers(theirs, task)[0]
    theirs.save_pretrained(tmp_path)
    ours = build()
    adapter = veneer.load(ours, tmp_path)
    assert isinstance(adapter.claims[0].method, veneer.PromptTuning)
    with torch.no_grad():
        close(answers(ours, task)[0], expected)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_networks_are_those_of_peft(encoder):
    ours, options = FAMILIES["llama"].model(), {"encoder_reparameterization_type": encoder.upper()}
    theirs = peft.get_peft_model(
        FAMILIES["llama"].model(), config("CAUSAL_LM", encoder_hidden_size=5, encoder_num_layers=2, **options)
    )
    theirs = theirs.double().eval()
    adapter = veneer.attach(ours, veneer.PTuning(LENGTH, encoder=encoder, hidden=5, layers=2))
    pairs = list(zip(adapter.parameters(), theirs.prompt_encoder.parameters(), strict=True))
    with torch.no_grad():
        for mine, peers in pairs:
            mine.copy_(peers)
    for model in (theirs, ours):
        logits, _ = answers(model, "CAUSAL_LM")
        logits.pow(2).mean().backward()
    for mine, peers in pairs:
        close(mine.grad, peers.grad)


def test_what_peft_reads_otherwise_is_kept_out_of_its_files(tmp_path):
    model = seeded(BertForSequenceClassification, BertConfig(vocab_size=VOCABULARY, **SIZES))
    veneer.save(veneer.attach(model, veneer.PromptTuning(LENGTH)), tmp_path / "ours")
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    peft.get_peft_model(model, config("SEQ_CLS")).save_pretrained(tmp_path / "theirs")
    veneer.detach(model, "default")
    with pytest.raises(veneer.errors.FileError, match="from the first position of the prompt"):
        veneer.load(model, tmp_path / "theirs")
