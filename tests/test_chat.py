"""A conversation with an adapted model, without a terminal: what is asked, answered, and left out."""

import pytest
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
