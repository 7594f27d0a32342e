"""The conversation in a terminal, and the progress of a training there, on a terminal that the test holds."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest
import small_run
from test_train import byte_tokenizer, tiny

import veneer
from veneer.train.chatting import Chat, converse
from veneer.train.evaluate import write
from veneer.train.examples import Example, encode_prompt, encode_turns


@pytest.fixture(scope="module")
def talker():
    """A model with an adapter whose answers differ from the base's, and its tokenizer."""
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    adapter = veneer.attach(model, veneer.LoRA(rank=4, alpha=64.0))
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.5)
    return model, tokenizer


def talk(talker, *lines, system=""):
    """What a conversation says, and the chat after it."""
    said, given = [], iter(lines)

    def read():
        line = next(given, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    chat = Chat(*talker, system, 6, said.append)
    converse(chat, read)
    return said, chat


def alone(talker, question, system=""):
    model, tokenizer = talker
    (answer,) = write(model, tokenizer, [encode_prompt(tokenizer, Example(question, "", system))], max_new_tokens=6)
    return answer


def test_an_answer_comes_in_pieces_and_is_the_likeliest(talker):
    said, chat = talk(talker, "thou art here", system="Modernize.")
    assert chat.turns[-1] == {"role": "assistant", "content": alone(talker, "thou art here", "Modernize.")}
    assert "".join(said[1:]).strip().startswith(chat.turns[-1]["content"])


def test_a_second_question_is_asked_after_the_first(talker):
    model, tokenizer = talker
    _, chat = talk(talker, "ye", "thou")
    asked = chat.turns[:3]
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant", "user", "assistant"]
    (expected,) = write(model, tokenizer, [encode_turns(tokenizer, asked)], max_new_tokens=6)
    assert chat.turns[3]["content"] == expected
    _, forgetful = talk(talker, "ye", "/reset", "thou")
    assert forgetful.turns[1]["content"] == alone(talker, "thou")
    assert len(forgetful.turns) == 2


def test_the_base_answers_beside_the_conversation(talker):
    model, _ = talker
    said, chat = talk(talker, "/base", "ye", "/base", "/quit", "never asked")
    with veneer.use(model):
        base = alone(talker, "ye")
    assert said[1] == "There is no question yet.\n"
    assert base != chat.turns[1]["content"]
    assert base in "".join(said[2:])
    assert len(chat.turns) == 2


def test_a_word_that_is_no_command_and_a_break(talker):
    said, chat = talk(talker, "/bse", "", KeyboardInterrupt())
    assert said[1].startswith("/bse is no command. /base answers")
    assert (said[-1], chat.turns) == ("\n", [])


class Terminal:
    """A program with a terminal of its own, whose words the test types and reads."""

    def __init__(self, *words):
        self.text = ""
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "veneer", *map(str, words)],
            stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        )  # fmt: skip
        os.close(theirs)

    def type(self, line):
        self.text = ""
        os.write(self.ours, f"{line}\n".encode())

    def until(self, words, seconds=120):
        """Read until the words are there."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            if not select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{words!r} never came; there is {self.text[-2000:]!r}")
            try:
                self.text += os.read(self.ours, 4096).decode(errors="replace")
            except OSError as error:  # the program has ended
                raise AssertionError(f"{words!r} never came; there is {self.text[-2000:]!r}") from error
        return self.text

    def end(self):
        try:
            while os.read(self.ours, 4096):
                pass
        except OSError:
            pass
        os.close(self.ours)
        return self.process.wait(60)


@pytest.mark.slow
def test_a_training_shows_its_progress_and_the_adapter_talks_in_a_terminal(tmp_path):
    recipe = small_run.make(tmp_path)
    training = Terminal("train", recipe)
    shown = training.until("adapter/ with recipe.yaml", 600)
    assert training.end() == 0
    assert "6/6" in shown
    assert "loss" in shown
    chat = Terminal("generate", tmp_path / "out" / "adapter", "--max-new-tokens", 8)
    chat.until("/quit ends it.", 300)
    chat.until("> ")
    chat.type("thou 3")
    chat.until("> ")
    chat.type("/base")
    chat.until("> ")
    chat.type("/reset")
    chat.until("The conversation is forgotten.")
    chat.type("/quit")
    assert chat.end() == 0
