"""From pairs of prompt and answer to a trained adapter, with transformers' Trainer doing the training.

rows = [encode(tokenizer, Example(prompt, answer)) for prompt, answer in pairs]
collator = Collator.of(model, tokenizer)
history = fit(model, adapter, rows, collator, Recipe(steps=100))
print(held_out_loss(model, others, collator))
"""

from veneer.train.accelerating import save_adapters_only
from veneer.train.batch import Collator
from veneer.train.callback import AdapterCallback
from veneer.train.encoding import Encoded, Example, encode, encode_prompt
from veneer.train.evaluate import answer_logits, chrf, held_out_loss, write
from veneer.train.fit import Recipe, fit
from veneer.train.progress import History

__all__ = [
    "AdapterCallback",
    "Collator",
    "Encoded",
    "Example",
    "History",
    "Recipe",
    "answer_logits",
    "chrf",
    "encode",
    "encode_prompt",
    "fit",
    "held_out_loss",
    "save_adapters_only",
    "write",
]
