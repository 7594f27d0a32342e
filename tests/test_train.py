"""From a prompt and its answer to a trained adapter: encoding, batches, measuring, training, and the whole demo."""

import io
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerState

import veneer
from veneer import demo
from veneer.errors import TemplateError, VeneerError
from veneer.samples import smollm2, verses, whole
from veneer.samples.verses import Verse
from veneer.train import (
    Collator,
    Example,
    Recipe,
    answer_logits,
    chrf,
    encode,
    encode_prompt,
    fit,
    held_out_loss,
    write,
)
from veneer.train.batch import by_length
from veneer.train.curve import draw, smoothed
from veneer.train.judge import Judge
from veneer.train.labels import IGNORED
from veneer.train.machine import fitted_to_machine, processors, versions
from veneer.train.progress import History, Watch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
EXAMPLES = [Example("thou art", "you are"), Example("ye", "you", "Modernize."), Example("whither goest thou", "where")]


def byte_tokenizer(template=CHATML, merges=()):
    """One token a byte, the merges, and the two marks of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:1]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def tiny(tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=end, pad_token_id=end, **sizes)
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # otherwise every answer is the same
    return model.to(dtype).eval()


@pytest.fixture
def model(tokenizer):
    return tiny(tokenizer)


@pytest.fixture
def rows(tokenizer):
    return [encode(tokenizer, example) for example in EXAMPLES]


# --- encoding


def test_the_labels_are_the_answer_and_the_end_of_its_turn(tokenizer):
    row = encode(tokenizer, Example("thou art", "you are"))
    asked = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(asked) == "you are<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>user\nthou art<|im_end|>\n<|im_start|>assistant\nyou are<|im_end|>"
    )
    assert row["input_ids"][-len(asked) :] == asked == row["labels"][-len(asked) :]
    assert set(row["labels"][: -len(asked)]) == {IGNORED}


def test_a_prompt_is_what_comes_before_the_answer(tokenizer):
    example = Example("ye", "you", "Modernize.")
    prompt = encode_prompt(tokenizer, example)
    row = encode(tokenizer, example)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert row["labels"][len(prompt)] != IGNORED
    assert tokenizer.decode(prompt).startswith("<|im_start|>system\nModernize.<|im_end|>\n<|im_start|>user\nye")


def test_an_answer_without_an_end_of_turn_ends_with_that_of_the_text():
    plain = byte_tokenizer("{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
                           "{% if add_generation_prompt %}a: {% endif %}")  # fmt: skip
    row = encode(plain, Example("ye", "you"))
    assert plain.decode([label for label in row["labels"] if label != IGNORED]) == "you\n<|im_end|>"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (byte_tokenizer(None), "has no chat template. Set tokenizer.chat_template"),
        (
            byte_tokenizer("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"),
            "leaves out the assistant's 'you are'",
        ),
    ],
    ids=["no template", "nothing to learn"],
)  # fmt: skip
def test_a_template_that_has_no_answer_is_refused(broken, message):
    with pytest.raises(TemplateError, match=message):
        encode(broken, EXAMPLES[0])
    with pytest.raises(TemplateError, match="The answer to 'thou art' is empty"):
        encode(byte_tokenizer(CHATML), Example("thou art", " "))
    assert issubclass(TemplateError, VeneerError)


# --- batches


def test_a_batch_is_padded_on_the_left_and_its_labels_end_where_the_answers_do(model, tokenizer, rows):
    batch = Collator.of(model, tokenizer)(rows)
    width = max(len(row["input_ids"]) for row in rows)
    answer = max(sum(label != IGNORED for label in row["labels"]) for row in rows)
    assert batch["input_ids"].shape == (3, width)
    assert batch["labels"].shape == (3, answer + 1)
    assert batch["logits_to_keep"].tolist() == list(range(width - answer - 1, width))
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][number, -length:].tolist() == row["input_ids"]
        assert batch["attention_mask"][number].tolist() == [0] * (width - length) + [1] * length
        assert batch["position_ids"][number, -length:].tolist() == list(range(length))
        assert batch["labels"][number].tolist() == ([IGNORED] * width + row["labels"])[-answer - 1 :]


def loss_by_hand(model, rows):
    """Mean over all answer tokens, one row at a time, without padding or a shortened head."""
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits.log_softmax(-1)[0]
        for place, label in enumerate(row["labels"]):
            if label != IGNORED:
                total -= float(scores[place - 1, label])
                tokens += 1
    return total / tokens


def test_the_models_own_loss_on_a_batch_is_the_loss_of_its_rows(model, tokenizer, rows):
    whole_head = Collator(tokenizer.pad_token_id, frozenset({"input_ids", "attention_mask"}))
    assert whole_head(rows)["labels"].shape == whole_head(rows)["input_ids"].shape
    for collator in (Collator.of(model, tokenizer), whole_head):
        assert model(**collator(rows)).loss.item() == pytest.approx(loss_by_hand(model, rows), rel=1e-5)


def test_batches_by_length_hold_every_row_once():
    groups = by_length([3, 9, 1, 9, 5], size=2)
    assert groups == [[1, 3], [4, 0], [2]]


# --- measuring


def test_the_held_out_loss_is_a_mean_over_tokens_whatever_the_batches(model, tokenizer, rows):
    collator = Collator.of(model, tokenizer)
    expected = loss_by_hand(model, rows)
    for size in (1, 2, 3):
        assert held_out_loss(model, rows, collator, batch_size=size) == pytest.approx(expected, rel=1e-5)
    means = [loss_by_hand(model, [row]) for row in rows]
    assert abs(sum(means) / len(means) - expected) > 1e-3  # so that a mean of means would have been noticed


def test_measuring_keeps_no_graph_and_the_mode_of_the_model(model, tokenizer, rows):
    collator = Collator.of(model, tokenizer)
    for training in (True, False):
        model.train(training)
        logits, targets = answer_logits(model, rows, collator)
        assert model.training is training
        assert not logits.requires_grad
    asked = [label for row in rows for label in row["labels"] if label != IGNORED]
    assert targets.tolist() == asked
    assert logits.shape == (len(asked), len(tokenizer))


def test_answers_come_in_the_order_of_the_prompts_and_as_if_each_were_alone(model, tokenizer):
    prompts = [encode_prompt(tokenizer, example) for example in EXAMPLES]
    alone = []
    for prompt in prompts:
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        alone.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip())
    for size in (1, 2, 3):
        assert write(model, tokenizer, prompts, max_new_tokens=6, batch_size=size) == alone
    assert len(set(alone)) == 3


def test_chrf_tells_a_copy_from_the_answer():
    assert chrf(["you are mine"], ["you are mine"]) == pytest.approx(100)
    assert chrf(["thou art mine"], ["you are mine"]) < 60


# --- training


def trained(tokenizer, steps=12, rate=0.02, console=None, optimizer="adamw", **options):
    model = tiny(tokenizer, torch.bfloat16)
    rows = [encode(tokenizer, example) for example in EXAMPLES * 8]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = veneer.attach(model, veneer.LoRA(rank=4, alpha=8.0))
    recipe = Recipe(steps=steps, batch_size=4, learning_rate=rate, optimizer=optimizer)
    history = fit(model, adapter, rows, Collator.of(model, tokenizer), recipe, console=console, **options)
    return model, adapter, history, before, rows


def test_training_lowers_the_loss_and_moves_only_the_adapter(tokenizer):
    model, adapter, history, before, rows = trained(tokenizer, steps=30)
    assert [step for step, _ in history.training] == list(range(1, 31))
    losses = [loss for _, loss in history.training]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert not model.training
    held = held_out_loss(model, rows[:3], Collator.of(model, tokenizer))
    with veneer.use(model):
        assert held < 0.7 * held_out_loss(model, rows[:3], Collator.of(model, tokenizer))


def test_a_seed_gives_the_same_training(tokenizer):
    one, other = trained(tokenizer, steps=4)[2], trained(tokenizer, steps=4)[2]
    assert one.training == other.training
    assert len(set(one.training)) == 4


def test_a_recipe_names_its_optimizer(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    losses = {name: trained(tokenizer, 4, optimizer=name)[2].training for name in ("adamw", "paged", "adamw-8bit")}
    assert losses["paged"] == losses["adamw"]
    with pytest.raises(veneer.errors.OptimizerError, match="no optimizer 'sgd'"):
        trained(tokenizer, 1, optimizer="sgd")


def test_the_optimizer_takes_the_adapters_own_groups(tokenizer, monkeypatch):
    groups = veneer.Adapter.parameter_groups
    monkeypatch.setattr(veneer.Adapter, "parameter_groups", lambda self, lr, ratio, head: groups(self, lr=0.0))
    _, adapter, _, _, _ = trained(tokenizer, steps=2)
    assert all(not parameter.any() for key, parameter in adapter.named_parameters() if key.endswith("B"))


@pytest.mark.parametrize("strength", [0.0, 100.0])
def test_training_adds_what_the_methods_add_to_the_loss(tokenizer, strength):
    model = tiny(tokenizer)
    for name in ("one", "two"):
        veneer.attach(model, veneer.BottleneckAdapter(width=4), name=name)
    fusion = veneer.fuse(model, ["one", "two"], method=veneer.AdapterFusion(regularization=strength))
    values = [p for key, p in fusion.named_parameters() if key.endswith("value")]
    for value in values:  # the parts add nothing yet, so only the term can move V
        value.data.add_(0.1)
    rows = [encode(tokenizer, example) for example in EXAMPLES * 8]
    recipe = Recipe(steps=5, batch_size=4, learning_rate=0.01)
    history = fit(model, fusion, rows, Collator.of(model, tokenizer), recipe)
    distance = sum((value - torch.eye(32)).pow(2).sum().item() for value in values)
    assert distance == pytest.approx(2 * 32 * 32 * 0.01) if strength == 0 else distance < 2 * 32 * 32 * 0.01 * 0.95
    assert history.training[0][1] < 1000  # the batch's own


def test_speed_counts_the_tokens_without_padding_and_the_time_without_probes(tokenizer, monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr("veneer.train.progress.time.perf_counter", lambda: float(next(now)))
    probes = iter([3.0, 2.0])

    def probe():
        for _ in range(100):
            next(now)
        return next(probes)

    _, _, history, _, rows = trained(tokenizer, steps=6, probe=probe, probe_at={2, 4})
    assert history.held_out == [(2, 3.0), (4, 2.0)]
    assert history.tokens == sum(len(row["input_ids"]) for row in rows)  # six batches of four see each of the 24 once
    assert history.seconds == 3 * 6 + 2  # a tick as a step begins, as it ends, as it is told; one to start each probe
    assert history.tokens_per_second == history.tokens / history.seconds


def test_without_a_terminal_ten_plain_lines_tell_how_it_goes(tokenizer, capfd):
    screen = io.StringIO()
    trained(tokenizer, steps=20, console=Console(file=screen, width=100))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("step 20/20  loss ")
    assert all("tokens/s" in line and "s left" in line for line in lines)
    assert capfd.readouterr() == ("", "")  # nothing from the Trainer itself


def test_on_a_terminal_there_is_one_bar(tokenizer, capfd):
    screen = io.StringIO()
    trained(tokenizer, steps=3, console=Console(file=screen, width=100, force_terminal=True))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    last = [line for line in plain.splitlines() if "training" in line][-1]
    assert "3/3 loss" in last
    assert "tokens/s  time left" in last
    assert last.count("training") == 1
    assert "step 3/3" not in screen.getvalue()
    assert capfd.readouterr() == ("", "")


# --- the picture and the machine


def test_smoothing_starts_at_the_first_loss_and_keeps_a_constant():
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([4.0, 0.0])[0] == pytest.approx(4.0)
    assert 0 < smoothed([4.0, 0.0])[1] < 4.0


def test_the_curve_is_a_picture(tmp_path):
    history = History(training=[(1, 2.0), (2, 1.5)], held_out=[(0, 2.1), (2, 1.6)])
    draw(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("quota", "expected"), [("100000 100000", 1), ("50000 100000", 1), ("150000 100000", 2)])
def test_a_control_group_limits_the_processors(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert processors(tmp_path / "cpu.max") == expected
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processors(tmp_path / "cpu.max") == processors(tmp_path / "none") == 8


def test_threads_fit_for_a_while(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("veneer.train.machine.processors", lambda: 1)
    with fitted_to_machine() as threads:
        assert threads == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_peak_is_that_of_the_process_and_versions_are_named():
    # in a process of its own, since this one may have had its peak already
    code = "from veneer.train.machine import peak_bytes as peak; import torch; cpu = torch.device('cpu')"
    code += "; first = peak(cpu); block = torch.ones(2**26); print(first, peak(cpu) - first, len(block))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, grown, elements = map(int, process.stdout.split())
    assert elements == 2**26
    assert 2**26 < first < 2**32
    assert 2**27 < grown < 2**29
    assert versions()["torch"] == torch.__version__


# --- the demo


def test_the_judge_compares_with_copying(model, tokenizer):
    judge = Judge(smollm2.Chat(model, tokenizer), EXAMPLES, max_new_tokens=4)
    judgement = judge(model)
    assert judgement.answers == write(
        model, tokenizer, [encode_prompt(tokenizer, e) for e in EXAMPLES], max_new_tokens=4
    )
    assert judgement.loss == pytest.approx(loss_by_hand(model, judge.rows), rel=1e-5)
    assert judge.copying() == chrf([e.prompt for e in EXAMPLES], [e.answer for e in EXAMPLES])
    assert judge.logits(model, 2).shape == (len("you are") + len("you") + 2, len(tokenizer))


@pytest.fixture
def little(tokenizer, monkeypatch, tmp_path):
    """The demo with a tiny model, few verses and few steps."""
    folder = whole.cached("model", lambda f: smollm2.save(smollm2.Chat(tiny(tokenizer), tokenizer), f), tmp_path / "in")
    monkeypatch.setattr(smollm2, "folder", lambda: folder)
    every = [Verse(f"Toy {n}", n // 4, n % 4, f"thou art {n}", f"you are {n}") for n in range(80)]
    monkeypatch.setattr(verses, "split", lambda seed: verses.Split(tuple(every[:60]), tuple(every[60:]), dropped=7))
    monkeypatch.setattr(demo, "QUICK", demo.Size(steps=15, held_out=6, probe_at=(5,), batch_size=4, learning_rate=0.02))
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    return tmp_path / "out"


def test_the_demo_leaves_what_it_says(little, capsys):
    little.mkdir()
    (little / "adapter").mkdir()
    (little / "adapter" / "stale").touch()
    report = demo.run_demo(little, quick=True, seed=1, json=True)
    out, err = capsys.readouterr()
    assert sorted(path.name for path in little.iterdir()) == ["adapter", "loss.png", "merged", "report.json"]
    assert json.loads(out) == json.loads((little / "report.json").read_text()) == report.model_dump(mode="json")
    assert not (little / "adapter" / "stale").exists()
    assert report.held_out_loss_after < report.held_out_loss_before
    assert report.held_out_loss_fall == pytest.approx(1 - report.held_out_loss_after / report.held_out_loss_before)
    assert [step for step, _ in report.held_out_loss] == [0, 5, 15]
    assert report.seed == 1
    assert report.dropped_verses == 7
    assert report.train_verses == 60
    assert report.held_out_verses == 6
    assert 0 < report.merged_max_abs_logit_diff < 1
    assert report.reloaded_texts_equal_merged == 3
    assert 0 < report.trainable < report.total
    assert report.adapter_bytes == sum(path.stat().st_size for path in (little / "adapter").iterdir())
    assert "Before training" in err
    assert report.examples[0].source in err


def test_what_the_demo_saves_can_be_used_again(little, tokenizer):
    report = demo.run_demo(little, quick=True)
    held = verses.split(0).held_out
    chosen = [demo.example(verse) for verse in demo.choose(held, 6, 0)]
    chat = smollm2.load(smollm2.folder())
    judge = Judge(chat, chosen, max_new_tokens=8)
    veneer.load(chat.model, little / "adapter")
    assert judge.loss(chat.model) == report.held_out_loss_after
    merged = smollm2.load(little / "merged").model
    assert [name for name in merged.state_dict() if "adapters" in name] == []
    assert judge.loss(merged) == pytest.approx(report.held_out_loss_after, rel=0.02)
    assert math.isfinite(report.chrf_after)


def test_training_adds_the_adapters_term_and_runs_its_schedule(tokenizer):
    """AdaLoRA ends with its target of triplets, and its P and Q are nearer to orthogonal than without the term."""
    ends = []
    for orthogonality in (0.0, 10.0):
        model = tiny(tokenizer)
        method = veneer.AdaLoRA(
            total_steps=12, initial_rank=4, target_rank=2, warmup=2, final=3, orthogonality=orthogonality
        )
        adapter = veneer.attach(model, method, where="attention.q | attention.v")
        rows = [encode(tokenizer, example) for example in EXAMPLES]
        recipe = Recipe(steps=12, batch_size=2, learning_rate=0.02, warmup_steps=0)
        history = fit(model, adapter, rows, Collator.of(model, tokenizer), recipe, console=Console(file=io.StringIO()))
        assert sum(int((claim.delta.E != 0).sum()) for claim in adapter.claims) == 2 * len(adapter.claims)
        off = [claim.delta.A @ claim.delta.A.T - torch.eye(4) for claim in adapter.claims]
        ends.append(sum(matrix.norm().item() for matrix in off))
        assert all(math.isfinite(loss) for _, loss in history.training)
    assert ends[1] < 0.8 * ends[0]


def test_a_run_that_goes_on_counts_what_it_does_itself(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("veneer.train.progress.time.perf_counter", lambda: float(next(now)))
    screen = io.StringIO()
    watch = Watch(Console(file=screen, width=100))
    state = TrainerState(global_step=8, max_steps=10, num_input_tokens_seen=900)
    watch.on_train_begin(None, state, None)
    state.global_step, state.num_input_tokens_seen = 9, 930
    watch.on_log(None, state, None, {"loss": 1.0})
    assert watch.history.tokens == 30
    assert watch.history.tokens_per_second == 30
    assert screen.getvalue().rstrip().endswith("30 tokens/s  1 s left")
