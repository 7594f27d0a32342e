"""From a recipe's `data` to a Trainer: options, held-out rows, cutting, order, streams, the report and the command."""

import io
import json
import math
import sys

import pytest
from templates import CHATML, byte_tokenizer, learned
from test_data_packing import llama

from veneer import cli
from veneer.errors import DataError, VeneerError
from veneer.samples import smollm2
from veneer.train.data import Data, prepare
from veneer.train.data.report import histogram, quantiles
from veneer.train.look import read


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count, start=0):
    return [{"prompt": f"question {n} ", "completion": f"answer {n}"} for n in range(start, start + count)]


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "train.jsonl", pairs(40))


def prepared(path, **options):
    return prepare(Data(path=str(path), **options), byte_tokenizer(CHATML))


def texts(rows):
    tokenizer = byte_tokenizer(CHATML)
    return [tokenizer.decode(row["input_ids"]) for row in rows or ()]


# --- the schema


def test_a_bare_string_is_the_path():
    assert Data.of("a.jsonl") == Data(path="a.jsonl")
    assert Data.of(["a.jsonl", "b.jsonl"]).paths == ["a.jsonl", "b.jsonl"]


def test_paths_of_a_recipe_are_beside_it(tmp_path, path):
    found = Data.of({"path": "train.jsonl", "held_out": "gone.jsonl"}, base=tmp_path)
    assert (found.path, found.held_out) == (path, "gone.jsonl")


def test_all_mistakes_of_a_recipe_are_said_at_once():
    with pytest.raises(DataError) as wrong:
        Data.of({"path": "a", "fromat": "alpaca", "max_length": 0, "held_out": 1.5, "loss_on": "answer", "labels": 3})
    assert str(wrong.value).splitlines() == [
        "data.held_out is not a fraction below 1, a count, or a file.",
        "data.max_length: Input should be greater than or equal to 1, not 0.",
        "data.loss_on: Input should be 'answers' or 'all', not 'answer'.",
        "data.labels is not a list of names, or numbers.",
        "data.fromat is no option of data. Closest: format.",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shuffle_buffer": 5}, "shuffle_buffer changes nothing without streaming"),
        ({"streaming": True, "drop_duplicates": True}, "drop_duplicates has to remember all rows"),
        ({"path": []}, "path is empty"),
    ],
)
def test_options_that_change_nothing_are_refused(options, said):
    with pytest.raises(DataError, match=said):
        Data.of({"path": "a", **options})


def test_options_that_a_format_does_not_have_are_all_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(DataError) as wrong:
        prepared(path, packing=True, system="Be kind.", truncate="start", loss_on="all")
    assert str(wrong.value).splitlines() == [
        "data.packing is for causal language models and changes nothing for the format classification. Leave it out.",
        "data.loss_on is for causal language models and changes nothing for the format classification. Leave it out.",
        "data.system is for conversations and changes nothing for the format classification. Leave it out.",
        "data.truncate: start is not for the format classification; choose end, drop, refuse.",
    ]
    with pytest.raises(DataError, match=r"columns maps 'txt', no field of any format .*Closest: text"):
        prepared(path, columns={"txt": "text"})
    with pytest.raises(DataError, match="a class needs another one"):
        prepared(path)
    with pytest.raises(DataError, match="choose a part of an id"):
        prepared(path, split="train")


# --- which rows


def test_held_out_rows_are_a_share_and_in_no_order_of_the_file(path):
    made = prepared(path, held_out=0.25)
    assert (len(made.train), len(made.held_out)) == (30, 10)
    assert not set(texts(made.train)) & set(texts(made.held_out))
    assert (made.report.rows, made.report.train, made.report.held_out) == (40, 30, 10)


def test_held_out_rows_stay_when_others_are_added(tmp_path, path):
    more = write(tmp_path / "more.jsonl", pairs(44)[::-1])
    first, second = (set(texts(prepared(p, held_out=10).held_out)) for p in (path, more))
    assert len(first & second) >= 7
    assert first != set(texts(prepare(Data(path=path, held_out=10), byte_tokenizer(CHATML), seed=1).held_out))


def test_what_asks_the_same_is_on_one_side(tmp_path):
    rows = [{"prompt": f"Question {n // 4}", "completion": f"answer {n}"} for n in range(80)]
    made = prepared(write(tmp_path / "a.jsonl", rows), held_out=20)
    assert len(made.held_out) == 20
    assert made.report.leakage == {"same": 0, "same_question": 0}


def test_one_question_for_all_rows_can_still_be_split(tmp_path):
    rows = [{"prompt": "Sing", "completion": f"la {n}"} for n in range(10)]
    made = prepared(write(tmp_path / "a.jsonl", rows), held_out=3)
    assert (len(made.train), len(made.held_out), made.report.leakage["same_question"]) == (7, 3, 3)


def test_a_held_out_file_and_what_leaks_from_it(tmp_path, path):
    same, asked = pairs(1)[0], {"prompt": "QUESTION 1", "completion": "another"}
    other = write(tmp_path / "test.jsonl", [same, asked, *pairs(2, start=100)])
    made = prepared(path, held_out=other)
    assert (len(made.train), len(made.held_out)) == (40, 4)
    assert made.report.leakage == {"same": 1, "same_question": 0}
    made = prepared(path, held_out=other, drop_duplicates=True)
    assert (len(made.train), made.report.leakage["same"]) == (39, 0)
    assert made.report.dropped == {"seen before, or held out": 1}


def test_duplicates_are_counted_and_dropped_when_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(5), *pairs(2)])
    assert (prepared(path, held_out=0).report.duplicates, len(prepared(path, held_out=0).train)) == (2, 7)
    assert len(prepared(path, held_out=0, drop_duplicates=True).train) == 5


def test_a_limit_and_the_order_are_the_seeds(path):
    first, again, other = (
        texts(prepare(Data(path=path, held_out=0, limit=10), byte_tokenizer(CHATML), seed=seed).train)
        for seed in (0, 0, 1)
    )
    assert len(first) == 10
    assert first == again != other
    told = prepare(Data(path=path, held_out=0, limit=10, seed=0), byte_tokenizer(CHATML), seed=1).train
    assert texts(told) == first
    assert texts(prepared(path, held_out=0, shuffle=False).train)[0] == "question 0 answer 0<|im_end|>"


def test_the_fingerprint_is_of_the_content(tmp_path, path):
    before = prepared(path).fingerprint
    assert before == prepared(path, limit=3).fingerprint
    write(tmp_path / "train.jsonl", pairs(41))
    assert before != prepared(path).fingerprint


# --- how much of them


@pytest.mark.parametrize(
    ("cut", "rows", "dropped"),
    [
        ("end", ["question 0 answe"], {}),
        ("start", ["tion 0 answer 0<|im_end|>"], {}),
        ("drop", [], {"longer than 16 tokens": 1}),
    ],
)
def test_examples_that_are_too_long(tmp_path, cut, rows, dropped):
    short = {"prompt": "a ", "completion": "b"}
    path = write(tmp_path / "a.jsonl", [*pairs(1), short])
    made = prepared(path, held_out=0, max_length=16, truncate=cut, shuffle=False)
    assert texts(made.train) == [*rows, "a b<|im_end|>"]
    assert (made.report.truncated, made.report.dropped) == (1 - len(dropped), dropped)


def test_refusing_names_the_rows(path):
    with pytest.raises(
        DataError, match=r"train.jsonl, line \d+ and \d+ other rows: 20 tokens are more than max_length 16"
    ):
        prepared(path, max_length=16, truncate="refuse")


def test_nothing_to_learn_is_refused(path, tmp_path):
    with pytest.raises(
        DataError, match=r"Nothing is left to learn from .*line .*40 without anything to learn in 8 tokens"
    ):
        prepared(path, held_out=0, max_length=8)
    silent = write(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(DataError, match="1 without an answer"):
        prepared(silent, held_out=0)


def test_a_tokenizer_says_how_much_its_model_takes(path):
    tokenizer = byte_tokenizer(CHATML, model_max_length=16)
    assert prepare(Data(path=path), tokenizer).report.max_length == 16
    with pytest.raises(DataError, match="takes 16 tokens"):
        prepare(Data(path=path, max_length=17), tokenizer)


def test_a_tokenizer_without_a_template_gets_the_plain_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "Hi", "output": "Hello"}])
    tokenizer = byte_tokenizer(None)
    made = prepare(Data(path=path, held_out=0, system="Be kind."), tokenizer)
    [text] = texts(made.train)
    assert text == "### System:\nBe kind.\n\n### User:\nHi\n\n### Assistant:\nHello<|im_end|>"
    assert made.report.template == "none of the tokenizer's; plain headings"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("### Assistant:\n")


def test_a_template_of_the_recipe(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "Hi", "output": "Hello"}])
    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
    made = prepare(Data(path=path, held_out=0, chat_template=str(tmp_path / "mine.jinja")), byte_tokenizer(None))
    assert texts(made.train)[0].startswith("<|im_start|>user")
    with pytest.raises(DataError, match=r"gone.jinja, which does not exist"):
        prepared(path, chat_template="gone.jinja")


def test_packed(path):
    made = prepared(path, packing=True, max_length=64)
    assert made.packed
    assert made.report.packed == len(made.train) < made.report.train == 38
    assert made.report.tokens == sum(made.train["length"][:])
    batch = made.collate([made.train[0], made.train[1]])
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape
    flat = prepare(Data(path=path, packing=True, max_length=64), byte_tokenizer(CHATML), attention="flash_attention_2")
    assert flat.collate([flat.train[0], flat.train[1]])["input_ids"].shape[0] == 1


# --- streams


def test_a_stream_has_the_rows_of_the_files(tmp_path, path):
    other = write(tmp_path / "more.jsonl", pairs(40, start=40))
    whole = prepared(tmp_path, held_out=0)
    stream = prepare(Data(path=[path, other], streaming=True, held_out=0.2), byte_tokenizer(CHATML))
    train, held = texts(stream.train), texts(stream.held_out)
    assert sorted(train + held) == sorted(texts(whole.train))
    assert 5 < len(held) < 28
    assert (stream.report.sampled, stream.report.train) == (True, len(train))
    assert stream.train.num_shards == 2


def test_the_order_of_a_stream_is_the_same_again_and_another_in_the_next_epoch(path):
    made = prepared(path, streaming=True, shuffle_buffer=10)
    first, again = texts(made.train), texts(made.train)
    assert first == again
    assert texts(made.train.skip(7)) == first[7:]
    made.train.set_epoch(1)
    assert sorted(texts(made.train)) == sorted(first)
    assert texts(made.train) != first


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_where_it_was(path, packing):
    options = {"packing": True, "max_length": 50} if packing else {}
    made = prepared(path, streaming=True, shuffle=False, held_out=0, **options)
    rows = iter(made.train)
    [next(rows) for _ in range(5)]
    state = made.train.state_dict()
    rest = texts(rows)
    other = prepared(path, streaming=True, shuffle=False, held_out=0, **options).train
    other.load_state_dict(state)
    assert texts(other) == rest != []


def test_counts_of_a_stream_are_its_first_rows(path):
    made = prepared(path, streaming=True, held_out=3, limit=10, shuffle=False)
    assert texts(made.held_out) == [f"question {n} answer {n}<|im_end|>" for n in range(3)]
    assert texts(made.train) == [f"question {n} answer {n}<|im_end|>" for n in range(3, 10)]


def test_classes_of_a_stream_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}])
    with pytest.raises(DataError, match=r"data.labels has to name the classes of a stream"):
        prepared(path, streaming=True, held_out=0)
    made = prepared(path, streaming=True, held_out=0, labels=["no", "yes"], shuffle=False)
    assert [row["labels"] for row in made.train] == [0, 1]


def test_a_late_mistake_of_a_stream_is_named_where_it_is_met(tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(1000), {"prompt": "a"}])
    made = prepared(path, streaming=True, held_out=0, shuffle=False)
    with pytest.raises(DataError, match="line 1001: no field 'completion'"):
        list(made.train)


# --- with the Trainer


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}, {"streaming": True}])
def test_the_trainer_takes_it(tmp_path, path, options):
    from transformers import Trainer, TrainingArguments

    made = prepared(path, **options)
    model = llama("sdpa").float()
    model.resize_token_embeddings(len(byte_tokenizer(CHATML)))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, made.collate, made.train, eval_dataset=made.held_out)
    assert math.isfinite(trainer.train().training_loss)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


# --- the report and the command


def test_lengths_are_told_by_quantiles_and_bars():
    lengths = [*range(1, 101)]
    assert quantiles(lengths) == {"min": 1, "median": 51, "p90": 90, "p99": 99, "max": 100}
    bars = histogram(lengths)
    assert sum(count for *_, count in bars) == 100
    assert len(bars) <= 12
    assert bars[0][0] == 1
    assert bars[-1][1] > 100
    assert histogram([7, 7]) == [(7, 8, 2)]


def test_the_report_is_for_people_and_for_programs(path):
    report = prepared(path, packing=True, max_length=64).report
    lines = "\n".join(report.lines())
    assert "prompt_completion for causal: 40 rows, 38 to train on, 2 held out" in lines
    assert f"packed into {report.packed} rows of 64 tokens" in lines
    found = json.loads(json.dumps(report.as_dict()))
    assert found["lengths"]["max"] == max(report.lengths)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["veneer", "data", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, *capsys.readouterr()


def test_the_command_shows_examples_and_counts(monkeypatch, capsys, tmp_path, path):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {smollm2.folder()}\nmethod: LoRA\noutput: out\ndata:\n  path: train.jsonl\n", encoding="utf-8"
    )
    code, out, _ = run(monkeypatch, capsys, str(tmp_path / "recipe.yaml"), "-n", "1")
    assert code == 0
    assert out.count("--- example") == 1
    assert "40 rows, 38 to train on, 2 held out" in out
    code, out, _ = run(monkeypatch, capsys, path, "--tokenizer", str(smollm2.folder()), "--json")
    found = json.loads(out)
    assert (found["train"], len(found["examples"]), len(found["fingerprint"])) == (38, 3, 64)


def test_what_is_only_read_is_dim(path):
    from rich.console import Console

    from veneer.train.data.report import shown

    [row] = prepared(path, held_out=0, shuffle=False, limit=1).train
    page = io.StringIO()
    Console(file=page, force_terminal=True, color_system="standard").print(shown(row, "causal", byte_tokenizer(), None))
    number = learned(byte_tokenizer(), row)[0].removeprefix("answer ").removesuffix("<|im_end|>")
    assert f"\x1b[2mquestion {number} \x1b[0manswer {number}<|im_end|>" in page.getvalue()


@pytest.mark.parametrize(
    ("row", "page"),
    [
        ({"source": "cat", "target": "rat"}, "cat\ntarget: rat<|im_end|>"),
        ({"prompt": "Hi", "chosen": " a", "rejected": " b"}, "Hi\nchosen:  a<|im_end|>\nrejected:  b<|im_end|>"),
        ({"text": "cold", "label": 0.5}, "cold\nlabel: 0.5"),
        ({"text": "hello"}, "hello<|im_end|>"),
    ],
)
def test_examples_of_other_tasks_are_shown(tmp_path, row, page):
    from veneer.train.data.report import shown

    made = prepared(write(tmp_path / "a.jsonl", [row]), held_out=0)
    assert shown(made.train[0], made.task, byte_tokenizer(), made.labels).plain == page


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "cannot be read as a recipe: [Errno 2] No such file"),
        ("data: [", "line 1: this is no YAML"),
        ("model: a\nmethod: LoRA\noutput: x", "line 1: data is missing"),
        ("method: LoRA\noutput: x\ndata: {path: train.jsonl}", "line 1: model is missing"),
        ("model: gone\nmethod: LoRA\noutput: x\ndata: {path: train.jsonl}", "gone cannot be loaded by AutoTokenizer"),
    ],
)
def test_mistakes_are_a_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path, path, recipe, said):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    code, _, err = run(monkeypatch, capsys, str(tmp_path / "recipe.yaml"))
    assert code == 2
    assert said in err


def test_a_recipe_names_model_and_seed(tmp_path, path):
    (tmp_path / "a.yaml").write_text(
        "model: {name: here}\nmethod: LoRA\ntraining: {seed: 3}\ndata: train.jsonl\noutput: out\n", encoding="utf-8"
    )
    data, model, seed = read(str(tmp_path / "a.yaml"))
    assert (data.path, model.name, seed) == (path, "here", 3)
    with pytest.raises(VeneerError, match=r"gone.yaml cannot be read"):
        read("gone.yaml")
