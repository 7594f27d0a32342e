"""Chat templates in the styles of well-known models, written for the tests, and a byte tokenizer to use them with."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<bos>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
QWEN3 = (  # reasoning only after the last question, calls of tools, results of tools as a user's turn
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% endif %}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response>"
    "<|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set parts = m.content.split('</think>') %}"
    "{% if loop.index0 > ns.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endif %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "assistant\n{% endif", "assistant\n<think>\n{% endif"
)  # which plain answers do not begin with
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITH_END = MARKED.replace("{% endgeneration %}", "<|im_end|>\n{% endgeneration %}").replace(
    "{% endif %}<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor"
)
MARKED_END_APART = MARKED_WITH_END.replace(
    "<|im_end|>\n{% endgen", "{% endgeneration %}{% generation %}<|im_end|>\n{% endgen"
)


def byte_tokenizer(template=None, merges=(), end="<|im_end|>", special=SPECIAL, **options):
    """One token a byte, the merges, and the special tokens of all templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=end,
        additional_special_tokens=special,
        name_or_path="tiny",
        pad_token=end,
        **options,
    )
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents, system=None):
    """A conversation of these contents, the user's and the assistant's in turn."""
    roles = ["user", "assistant"] * len(contents)
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def learned(tokenizer, row):
    """The texts of a row that have labels, one by one."""
    found, open_ = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != -100:
            assert token == label
            found = [*found[:-1], [*found[-1], label]] if open_ else [*found, [label]]
        open_ = label != -100
    return [tokenizer.decode(part) for part in found]
