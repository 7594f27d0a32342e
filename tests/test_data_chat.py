"""Which tokens of a conversation are learned: those of the answers and of their ends, whatever the template does."""

import pytest
from templates import (
    CHATML,
    GEMMA,
    LLAMA3,
    MARKED,
    MARKED_END_APART,
    MARKED_WITH_END,
    MISTRAL,
    QWEN3,
    THINKING,
    byte_tokenizer,
    learned,
    turns,
)  # fmt: skip
from tokenizers import AddedToken

from veneer.errors import TemplateError
from veneer.samples import smollm2
from veneer.train.data.chat import PLAIN, Template, in_parts

TWO = turns("Hi", "Hello", "Bye", "See you")
THOUGHT = turns("Hi", "<think>\nshort\n</think>\n\nHello", "Bye", "<think>\nlong\n</think>\n\nSee you")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


def encoded(template, messages, tools=None, all_tokens=False, **options):
    tokenizer = byte_tokenizer(template, **options)
    made = Template(tokenizer)
    return tokenizer, made, [row for row, _ in made.encoded(messages, tools, all_tokens)]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["Hello<|im_end|>", "See you<|im_end|>"]),
        (LLAMA3, ["Hello<|eot_id|>", "See you<|eot_id|>"]),
        (GEMMA, ["Hello<end_of_turn>", "See you<end_of_turn>"]),
        (MISTRAL, [" Hello</s>", " See you</s>"]),
        (MARKED, ["Hello<|im_end|>", "See you<|im_end|>"]),
        (MARKED_END_APART, ["Hello<|im_end|>", "See you<|im_end|>"]),
        (MARKED_WITH_END, ["Hello<|im_end|>", "See you<|im_end|>"]),
        (PLAIN, ["Hello<|im_end|>", "See you<|im_end|>"]),
        (THINKING, ["Hello<|im_end|>", "See you<|im_end|>"]),
    ],
)
def test_answers_and_their_ends_are_learned_and_nothing_else(template, answers):
    tokenizer, _, [row] = encoded(template, TWO)
    assert learned(tokenizer, row) == answers
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TWO, tokenize=False).rstrip("\n")


def test_stock_templates_give_transformers_own_mask_nothing_but_zeros():
    """What this is for: no marks, no mask, no error."""
    for template in (CHATML, LLAMA3, GEMMA, MISTRAL, QWEN3):
        found = byte_tokenizer(template).apply_chat_template(TWO, return_assistant_tokens_mask=True, return_dict=True)
        assert not any(found["assistant_masks"])


def test_the_template_of_a_real_model():
    tokenizer = smollm2.load(smollm2.folder()).tokenizer
    [(row, joined)] = Template(tokenizer).encoded(TWO, None, all_tokens=False)
    assert learned(tokenizer, row) == ["Hello<|im_end|>", "See you<|im_end|>"]
    assert joined == 0
    assert row["input_ids"] == tokenizer(tokenizer.apply_chat_template(TWO, tokenize=False))["input_ids"][:-1]


def test_reasoning_that_the_template_drops_from_earlier_turns_is_learned_where_it_was_last():
    tokenizer, _, rows = encoded(QWEN3, THOUGHT)
    assert [learned(tokenizer, row) for row in rows] == [
        ["<think>\nshort\n</think>\n\nHello<|im_end|>"],
        ["<think>\nlong\n</think>\n\nSee you<|im_end|>"],
    ]
    second = tokenizer.decode(rows[1]["input_ids"])
    assert second.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user")


def test_what_comes_before_an_answer_is_what_the_model_is_asked_with():
    for template in (CHATML, LLAMA3, GEMMA, MISTRAL, QWEN3):
        tokenizer, _, rows = encoded(template, TWO)
        ids, labels = rows[-1]["input_ids"], rows[-1]["labels"]
        start = len(ids) - next(i for i, label in enumerate(reversed(labels)) if label == -100)
        asked = tokenizer.apply_chat_template(TWO[:-1], add_generation_prompt=True, return_dict=False)
        assert ids[:start] == asked


def test_an_opening_that_answers_do_not_have_is_told():
    _, template, _ = encoded(THINKING, TWO)
    assert list(template.notes) == [
        "Asked to answer, the template writes '<|im_start|>assistant\\n<think>\\n'; before these answers stands "
        "'<|im_start|>assistant\\n'."
    ]


def test_an_answer_that_begins_like_the_opening_is_whole():
    """Taking what two renderings share for the prompt would eat the first letters of this one."""
    tokenizer, _, [row] = encoded(THINKING, turns("Hi", "<thx> Hello"))
    assert learned(tokenizer, row) == ["<thx> Hello<|im_end|>"]


def test_calls_of_tools_are_learned_and_their_results_are_not():
    messages = [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    tokenizer, _, [row] = encoded(QWEN3, messages, [TOOL])
    call, answer = learned(tokenizer, row)
    assert call.endswith('{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>')
    assert answer == "<think>\n\n</think>\n\nIt rains.<|im_end|>"
    assert "rain</tool_response>" in tokenizer.decode(row["input_ids"])


def test_all_tokens():
    tokenizer, _, [row] = encoded(CHATML, TWO, all_tokens=True)
    assert row["labels"] == row["input_ids"]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TWO, tokenize=False)


def test_a_conversation_that_the_assistant_opens():
    tokenizer, _, [row] = encoded(CHATML, [{"role": "assistant", "content": "Welcome"}, *TWO])
    assert learned(tokenizer, row) == ["Welcome<|im_end|>", "Hello<|im_end|>", "See you<|im_end|>"]


def test_a_user_who_speaks_last_is_left_out():
    tokenizer, _, [row] = encoded(CHATML, [*TWO, {"role": "user", "content": "And?"}])
    assert tokenizer.decode(row["input_ids"]).endswith("See you<|im_end|>")


TOOLS_ONLY = "{{ tools | tojson }}" + CHATML  # names the tool, but writes no call
BACKWARDS = "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "tools", "said"),
    [
        (GEMMA, turns("Hi", "Hello", system="Be kind."), None, "cannot render the roles system, user.*System role not"),
        (BACKWARDS, TWO, None, "turn 2 so that the place of the answer cannot be told.*data.chat_template"),
        (MISTRAL, turns("Hi", "Hello", system="Be kind."), None, "leaves out the system's 'Be kind.'"),
        (CHATML, turns("Hi", "Hello"), [TOOL], "leaves out the tool weather"),
        (
            TOOLS_ONLY,
            [*turns("Hi"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            [TOOL],
            "calls of tools",
        ),
        (CHATML, [*turns("Hi"), {"role": "assistant", "content": "", "tool_calls": [CALL]}], None, "calls of tools"),
    ],
)
def test_templates_that_lose_something_are_refused(template, messages, tools, said):
    with pytest.raises(TemplateError, match=said):
        encoded(template, messages, tools)


def test_marks_that_mark_nothing_are_told_and_done_without():
    odd = MARKED.replace("{% if m.role == 'assistant' %}{% generation", "{% if m.role == 'robot' %}{% generation")
    tokenizer, template, [row] = encoded(odd, TWO)
    assert learned(tokenizer, row) == ["Hello<|im_end|>", "See you<|im_end|>"]
    assert "leave out parts of answers" in next(iter(template.notes))


def test_reasoning_that_marks_leave_out_is_found_without_them():
    dropping = MARKED.replace("{% generation %}{{ m.content }}", "{% generation %}{{ m.content if loop.last else "
                              "m.content.split('</think>')[-1].strip() }}")  # fmt: skip
    tokenizer, _, rows = encoded(dropping, THOUGHT)
    assert [learned(tokenizer, row)[0] for row in rows] == [f"{m['content']}<|im_end|>" for m in THOUGHT[1::2]]


def test_reasoning_that_a_template_opens_but_leaves_out_stands_behind_the_opening():
    r1 = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
        "{{ m.content.split('</think>')[-1].strip() }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
    )
    tokenizer, template, rows = encoded(r1, THOUGHT)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [
        "<|im_start|>Hi<|im_end|><think>\nshort\n</think>\n\nHello</s>",
        "<|im_start|>Hi<|im_end|>Hello</s><|im_start|>Bye<|im_end|><think>\nlong\n</think>\n\nSee you</s>",
    ]
    assert [learned(tokenizer, row) for row in rows] == [
        ["short\n</think>\n\nHello</s>"], ["long\n</think>\n\nSee you</s>"],
    ]  # fmt: skip
    assert "put behind the opening" in next(iter(template.notes))


def test_reasoning_goes_where_the_template_wants_it():
    apart = CHATML.replace("{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
                           "{% endif %}{{ m.content }}")  # fmt: skip
    tokenizer, _, [row] = encoded(apart, THOUGHT)
    assert learned(tokenizer, row) == ["<think>short</think>Hello<|im_end|>", "<think>long</think>See you<|im_end|>"]


def test_an_answer_that_ends_where_the_next_turn_begins():
    """GLM's models stop by writing the token that begins the next turn."""
    glm = "{% for m in messages %}[{{ '' }}INST]{{ m.role }}\n{{ m.content }}{% endfor %}"
    glm += "{% if add_generation_prompt %}[INST]assistant\n{% endif %}"
    tokenizer, template, [row] = encoded(glm, TWO)
    assert learned(tokenizer, row) == ["Hello[INST]", "See you<|im_end|>"]
    assert list(template.notes) == ["The template ends an answer with nothing; <|im_end|> was put behind the last one."]


def test_an_end_of_turn_that_is_no_special_token():
    tokenizer = byte_tokenizer(CHATML, end="</s>", special=["</s>"])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|im_start|>", "<|im_end|>")])
    [(row, _)] = Template(tokenizer).encoded(TWO, None, all_tokens=False)
    assert learned(tokenizer, row) == ["Hello<|im_end|>", "See you<|im_end|>"]


def test_what_stands_only_behind_the_last_answer_is_not_learned():
    """Phi's template writes the end of the text where no answer is asked for."""
    phi = CHATML.replace("{% endfor %}", "{% endfor %}{{ '' if add_generation_prompt else '</s>' }}")
    tokenizer, _, [row] = encoded(phi, TWO)
    assert learned(tokenizer, row) == ["Hello<|im_end|>", "See you<|im_end|>"]


def test_templates_that_want_parts():
    seeing = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text if p.type == 'text' }}"
                            "{% endfor %}")  # fmt: skip
    tokenizer, template, [row] = encoded(seeing, TWO)
    assert template.parts
    assert learned(tokenizer, row) == ["Hello<|im_end|>", "See you<|im_end|>"]


def test_parts_joined_by_a_token_are_tokenized_alone():
    tokenizer = byte_tokenizer(merges=[("Ġ", "y")])
    parts, joined = in_parts(tokenizer, ("A: ", "yes"))
    assert joined == 1
    assert [tokenizer.decode(part) for part in parts] == ["A: ", "yes"]
    assert tokenizer.convert_ids_to_tokens(parts[0])[-1] == "Ġ"
    assert in_parts(tokenizer, ("A:", " yes")) == ([tokenizer("A:")["input_ids"], tokenizer(" yes")["input_ids"]], 0)
