"""The small real task of these benchmarks: is a sentence of a film review positive? Read by MiniLM.

MiniLM (all-MiniLM-L6-v2) was trained to say what a sentence means by the mean of its token states; the pooler that its
file holds was never trained. So the head here reads that mean, and it starts as the best logistic regression on the
frozen model: whatever a method gains is gained over the frozen features.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, BertPreTrainedModel, get_linear_schedule_with_warmup
from transformers.modeling_outputs import SequenceClassifierOutput

import veneer
from veneer.samples import minilm, sentiment

BATCH, HELD_OUT, VALIDATION, SEED = 16, 1000, 250, 0
HEAD = ["classifier"]
HEAD_LR = 1e-3
Batch = dict[str, Tensor]


class SentenceClassifier(BertPreTrainedModel):
    """BERT, the mean of its token states, and a linear head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        states = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        logits = self.classifier(mean)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=(mean,))


class Judged(NamedTuple):
    """`right` says of each sentence whether it was read rightly."""

    right: Tensor
    loss: float


class Run:
    """AdamW at a rate that warms up and then falls, linearly; the head has a rate of its own, the same for all."""

    def __init__(self, model: Any, adapter: veneer.Adapter, lr: float, batches: list[Batch]) -> None:
        torch.manual_seed(SEED)
        self.model, self.adapter, self.batches = model, adapter, batches
        self.done, self.seconds = 0, 0.0
        parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for key, parameter in adapter.named_parameters():
            parts[key.startswith("classifier.")].append(parameter)
        groups = [{"params": parts[is_head], "lr": HEAD_LR if is_head else lr} for is_head in parts if parts[is_head]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, len(batches) // 20, len(batches))

    def until(self, step: int) -> Run:
        """Train until so many steps are done; `seconds` counts those of the processor."""
        self.model.train()
        start = time.process_time()
        for batch in self.batches[self.done : step]:
            loss = self.model(**batch).loss
            extra = self.adapter.regularization()
            (loss if extra is None else loss + extra).backward()
            nn.utils.clip_grad_norm_(list(self.adapter.parameters()), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.done += 1
            self.adapter.after_step(self.done)
            self.optimizer.zero_grad()
        self.seconds += time.process_time() - start
        return self


class Task:
    """The sentences as batches, the same for all; `longest` leaves longer ones (in tokens) out, but for the held-out.

    Each is read once in training, so there is no dropout.
    """

    def __init__(self, steps: int, held_out: int = HELD_OUT, longest: int = 512, seed: int = SEED) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(minilm.folder())
        training, judged = sentiment.load(max(HELD_OUT, held_out), SEED)
        training = [s for s in training if len(self.tokenizer(s.text)["input_ids"]) <= longest]
        validation, training = training[:VALIDATION], training[VALIDATION:]
        order = random.Random(seed)
        order.shuffle(training)
        batches: list[list[sentiment.Sentence]] = []
        for start in range(0, len(training), BATCH * 10):  # sentences of like length together: little is padded
            chunk = sorted(training[start : start + BATCH * 10], key=lambda s: len(s.text))
            batches += order.sample(
                [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)], -(-len(chunk) // BATCH)
            )
        self.training = [self._batch(batches[step % len(batches)]) for step in range(steps)]
        self.validation, self.held_out = self._batches(validation), self._batches(judged[:held_out])

    def frequent(self, count: int) -> tuple[int, ...]:
        """The tokens that stand in most training sentences."""
        found = Counter(token for batch in self.training for row in batch["input_ids"].tolist() for token in set(row))
        return tuple(sorted(token for token, _ in found.most_common(count)))

    def _batches(self, sentences: list[sentiment.Sentence]) -> list[Batch]:
        ordered = sorted(sentences, key=lambda s: len(s.text))
        return [self._batch(ordered[i : i + 100]) for i in range(0, len(ordered), 100)]

    def _batch(self, sentences: list[sentiment.Sentence]) -> Batch:
        texts = self.tokenizer([s.text for s in sentences], padding=True, return_tensors="pt")
        return {**texts, "labels": torch.tensor([int(s.positive) for s in sentences])}

    def model(self) -> Any:
        """MiniLM in float32 with the head of the baseline, the same each time."""
        model = copy.deepcopy(self._frozen)
        model.classifier.load_state_dict(self.head.state_dict())
        return model

    @cached_property
    def _frozen(self) -> Any:
        torch.manual_seed(SEED)
        still = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        return SentenceClassifier.from_pretrained(minilm.folder(), dtype=torch.float32, **still).eval()

    @cached_property
    def head(self) -> nn.Linear:
        """Logistic regression on the frozen features of the training sentences; the penalty by validation loss."""
        (x, y), (vx, vy) = (_features(self._frozen, batches) for batches in (self.training, self.validation))
        heads = [_regression(x, y, penalty) for penalty in (1e-3, 1e-2, 1e-1)]
        return min(heads, key=lambda head: F.cross_entropy(head(vx), vy).item())

    @torch.no_grad()
    def judge(self, model: Any, batches: list[Batch]) -> Judged:
        """How the model reads these sentences."""
        model.eval()
        logits, labels = (torch.cat(z) for z in zip(*((model(**b).logits, b["labels"]) for b in batches), strict=True))
        return Judged(logits.argmax(-1) == labels, F.cross_entropy(logits, labels).item())


@torch.no_grad()
def _features(model: Any, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    found = [(model(**batch).hidden_states[0], batch["labels"]) for batch in batches]
    means, labels = zip(*found, strict=True)
    return torch.cat(means), torch.cat(labels)


def _regression(x: Tensor, y: Tensor, penalty: float) -> nn.Linear:
    """The loss is of x in its own spread, so that the penalty means the same for any model; the answer is of x."""
    center, spread = x.mean(0), x.std(0).mean()
    head = nn.Linear(x.shape[1], 2)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head((x - center) / spread), y) + penalty * head.weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        head.weight /= spread
        head.bias -= head.weight @ center
    return head
