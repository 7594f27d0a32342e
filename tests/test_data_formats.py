"""Files and rows: what each format means, and what is said of files that are wrong."""

import json

import pytest
from templates import CHATML, byte_tokenizer, learned

from veneer.errors import DataError
from veneer.train.data import Data, prepare, recognize, sources
from veneer.train.data.formats import FORMATS, parse
from veneer.train.data.kinds import Chat, Labelled, Preference
from veneer.train.data.sources import Row

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(path, **options):
    return prepare(Data(path=str(path), **{"held_out": 0, **options}), byte_tokenizer(CHATML))


def texts(made):
    tokenizer = byte_tokenizer(CHATML)
    return [(tokenizer.decode(row["input_ids"]), learned(tokenizer, row)) for row in made.train]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognized_by_its_example(name):
    row = Row("a, line 1", json.loads(FORMATS[name].example), "")
    from veneer.train.data.formats import recognized

    assert recognized(row, {}) == name


def test_alpaca(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 1", "output": "2", "system": "Brief."}])
    assert texts(prepared(path)) == [(
        "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nAdd.\n\n1 1<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>", ["2<|im_end|>"],
    )]  # fmt: skip


def test_sharegpt_with_calls(tmp_path):
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    found = parse(Row("a", {"conversations": turns, "tools": json.dumps([TOOL]), "system": "Be."}, ""), "sharegpt", {})
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Bern"}}
    assert found.tools == [TOOL]


def test_messages_lose_what_parquet_adds_and_openai_writes_as_text():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    parts = [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]
    rows = [
        {"role": "user", "content": parts, "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
    ]
    found = parse(Row("a", {"messages": rows, "tools": None}, ""), "messages", {})
    want = {**call, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    assert found == Chat(
        [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [want]}]
    )


def test_prompt_and_completion_are_taken_as_they_stand(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "cat =>", "completion": " chat"}])
    assert texts(prepared(path)) == [("cat => chat<|im_end|>", [" chat<|im_end|>"])]
    [(_, both)] = texts(prepared(path, loss_on="all"))
    assert both == ["cat => chat<|im_end|>"]


def test_prompt_and_completion_as_messages(tmp_path):
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    [(_, answers)] = texts(prepared(write(tmp_path / "a.jsonl", [row])))
    assert answers == ["Hello<|im_end|>"]


def test_documents_are_split_not_cut(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "one.txt").write_text("abcdefgh", encoding="utf-8")
    (folder / "two.md").write_text("xy", encoding="utf-8")
    made = prepared(folder, max_length=4, shuffle=False)
    assert [text for text, _ in texts(made)] == ["abcd", "efgh", "xy<|im_end|>"]
    assert made.report.truncated == 1


def test_preferences(tmp_path):
    rows = [
        {"prompt": "Hi", "chosen": " Hello", "rejected": " No"},
        {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
         "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]},
    ]  # fmt: skip
    tokenizer = byte_tokenizer(CHATML)
    for row, prompt, chosen in zip(rows, ("Hi", None), (" Hello<|im_end|>", "Hello<|im_end|>"), strict=True):
        made = prepared(write(tmp_path / "a.jsonl", [row]))
        [columns] = made.train
        opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(columns["prompt_ids"]) == (prompt or opening)
        assert tokenizer.decode(columns["chosen_ids"]) == chosen
        batch = made.collate(list(made.train))
        assert batch["input_ids"].shape[0] == 2
        assert batch["completion_mask"].sum(dim=1).tolist() == [
            len(columns[f"{n}_ids"]) for n in ("chosen", "rejected")
        ]
    assert isinstance(parse(Row("a", {"prompt": "Q", **rows[1]}, ""), "preference", {}), Preference)


@pytest.mark.parametrize(
    ("labels", "values", "task", "names"),
    [
        (["good", "bad", "good"], [1, 0, 1], "sequence_classification", ["bad", "good"]),
        ([0, 10, 2], [0, 2, 1], "sequence_classification", ["0", "2", "10"]),
        ([0.5, 1, 3], [0.5, 1.0, 3.0], "regression", None),
    ],
)
def test_labels_are_classes_or_numbers(tmp_path, labels, values, task, names):
    path = write(tmp_path / "a.jsonl", [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)])
    made = prepared(path, shuffle=False)
    assert (made.task, made.labels, made.train["labels"][:]) == (task, names, values)
    assert made.collate(list(made.train))["labels"].tolist() == values


def test_labels_in_the_order_of_the_recipe(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "text_pair": "b", "label": "no"}])
    made = prepared(path, labels=["yes", "no"])
    assert (made.train["labels"][:], made.report.labels) == ([1], {"yes": 0, "no": 1})
    with pytest.raises(DataError, match=r"line 1: label 'no' is none of yes, nope. Closest: nope"):
        prepared(path, labels=["yes", "nope"])
    assert prepared(write(tmp_path / "b.jsonl", [{"text": "a", "label": 1}]), labels="numbers").task == "regression"


def test_sequence_to_sequence(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"source": "cat", "target": "chat"}, {"source": "a", "target": "le un"}])
    made = prepared(path, shuffle=False)
    batch = made.collate(list(made.train))
    tokenizer = byte_tokenizer(CHATML)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert tokenizer.decode(batch["labels"][1]) == "le un<|im_end|>"
    assert batch["labels"][0, -1] == -100


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "parquet"])
def test_tables(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    rows = [{"prompt": "one, two", "completion": "three"}, {"prompt": "4", "completion": "5"}]
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps({"version": 1, "data": rows}, indent=1), encoding="utf-8")
    else:
        mark = "," if suffix == "csv" else "\t"
        path.write_text(f'prompt{mark}completion\n"one, two"{mark}three\n4{mark}5\n', encoding="utf-8")
    assert [row.fields for row in sources.find([str(path)], None, None, False)] == rows


def test_other_names_of_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "1 1", "answer": "2", "prompt": "not this"}])
    data = Data(path=path, columns={"prompt": "question", "completion": "answer"}, held_out=0)
    assert recognize(data) == ("prompt_completion", "causal")
    assert texts(prepare(data, byte_tokenizer(CHATML))) == [("1 12<|im_end|>", ["2<|im_end|>"])]


def test_a_field_of_another_name_is_said_with_the_nearest(tmp_path):
    good = {"instruction": "a", "output": "b"}
    path = write(
        tmp_path / "a.jsonl", [good, {"instruction": "a", "outptu": "b"}, good, {"instruction": "a", "output": 3}]
    )
    with pytest.raises(DataError) as wrong:
        prepared(path)
    assert str(wrong.value).splitlines() == [
        f"{path}, line 2: no field 'output'. Closest: outptu. The format alpaca needs instruction, output; "
        "it has instruction, outptu.",
        f"{path}, line 4: field 'output' is a number, not text.",
    ]


def test_the_same_mistake_is_said_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "answer": "b"}] * 1000)
    with pytest.raises(DataError, match=r"line 1 and 999 other rows: no field 'output'") as wrong:
        prepared(path, format="alpaca")
    assert "\n" not in str(wrong.value)


def test_all_lines_that_are_not_json_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n\n{"text": "b"}\nnonsense\n', encoding="utf-8")
    with pytest.raises(DataError) as wrong:
        prepared(path)
    assert [line.split(": ")[0] for line in str(wrong.value).splitlines()] == [f"{path}, line 2", f"{path}, line 5"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "usr", "content": "a"}]}, r"message 1 of 'messages' has the role 'usr'.*Closest: user"),
        ({"messages": []}, "field 'messages' is empty, not a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts of other kinds than text"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "turn 1 of 'conversations' is from 'me'"),
        ({"chosen": "a", "rejected": "b"}, "no field 'prompt'"),
        ({"image": "gone.png", "label": "a"}, r"names gone.png, which is no file below .*Closest: gone.jpg"),
        ({"alpha": 1}, r"has the fields alpha, which show no format \(sharegpt: conversations; "),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path, row, said):
    from transformers import ViTImageProcessor

    (tmp_path / "gone.jpg").touch()
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=said):
        prepare(Data(path=path, held_out=0), ViTImageProcessor() if "image" in row else byte_tokenizer(CHATML))


def test_paths_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").touch()
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(DataError, match=rf"{tmp_path.name}/train.jsonll does not exist. Closest: train.jsonl"):
        prepared(f"{tmp_path.name}/train.jsonll")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist. Closest: train.jsonl"):
        prepared(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        prepared(tmp_path / "train.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no file to train on"):
        prepared(tmp_path / "empty")
    with pytest.raises(DataError, match="'nobody/nothing' is no file here, and the datasets library cannot load it"):
        prepared("nobody/nothing")


def test_a_class_a_folder(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    from transformers import ViTImageProcessor

    for number, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (20, 12), (80 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    data = Data(path=str(tmp_path), held_out=0, shuffle=False)
    made = prepare(data, ViTImageProcessor(size={"height": 8, "width": 8}))
    batch = made.collate(list(made.train))
    assert (made.task, made.labels, made.report.labels) == (
        "image_classification",
        ["cat", "dog"],
        {"cat": 1, "dog": 2},
    )
    assert tuple(batch["pixel_values"].shape) == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 1]
    assert len({float(one.mean()) for one in batch["pixel_values"]}) == 3


@pytest.mark.parametrize(("dtype", "rate"), [("int16", 16_000), ("float32", 8_000), ("uint8", 44_100)])
def test_speech(tmp_path, dtype, rate):
    import numpy as np
    from scipy.io import wavfile
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    from veneer.train.data import media

    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), byte_tokenizer())
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    scaled = {"int16": wave * 2**15, "float32": wave, "uint8": wave * 127 + 128}[dtype]
    wavfile.write(tmp_path / "a.wav", rate, scaled.astype(dtype))
    made = prepare(Data(path=write(tmp_path / "a.jsonl", [{"audio": "a.wav", "text": "beep"}]), held_out=0), processor)
    batch = made.collate(list(made.train))
    assert tuple(batch["input_features"].shape) == (1, 8, 100)
    assert byte_tokenizer().decode(batch["labels"][0]) == "beep<|im_end|>"
    samples = media.recording({"path": str(tmp_path / "a.wav")}, 16_000)
    want = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(samples - want)[200:-200].max() < 0.02
    (tmp_path / "a.wav").write_bytes(b"not a recording")
    with pytest.raises(DataError, match=r"a.wav (is no WAV file|cannot be read)"):
        made.collate(list(made.train))


def test_labelled_rows_keep_their_pair():
    assert parse(Row("a", {"text": "a", "text_pair": "b", "label": True}, ""), "pairs", {}) == Labelled("a", "b", 1)


def test_two_texts_with_bert(tmp_path):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "rains", "is", "dry"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=6)
    rows = [
        {"text": "it rains", "text_pair": "it is dry", "label": "no"},
        {"text": "it", "text_pair": "is", "label": "yes"},
    ]
    made = prepare(Data(path=write(tmp_path / "a.jsonl", rows), held_out=0, shuffle=False), tokenizer)
    batch = made.collate(list(made.train))
    assert tokenizer.batch_decode(batch["input_ids"]) == [
        "[CLS] it [SEP] it is [SEP]",
        "[CLS] it [SEP] is [SEP] [PAD]",
    ]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert (batch["labels"].tolist(), made.report.truncated) == ([0, 1], 1)


def test_texts_where_messages_are_wanted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"data.system is for messages; the rows of .*line 1 are texts"):
        prepared(path, system="Be kind.")
    messages = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    mixed = [{"prompt": "a", "completion": "b"}, dict(zip(("prompt", "completion"), messages, strict=True))]
    with pytest.raises(DataError, match=r"line 2: messages, where the first row has texts"):
        prepared(write(tmp_path / "b.jsonl", mixed))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a.jsonl", "label": "x"}, "Images need an image processor"),
        ({"audio": "a.jsonl", "text": "x"}, "Speech needs a processor"),
    ],
)
def test_what_reads_the_rows_has_to_fit(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        prepared(write(tmp_path / "a.jsonl", [row]))
