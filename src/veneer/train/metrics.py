"""Figures by the names of the library `evaluate`, computed by scikit-learn, scipy, sacrebleu, rouge-score and jiwer.

| name | of | what |
|---|---|---|
| accuracy, matthews_correlation | classes | share of right ones; correlation of Matthews (-1 to 1) |
| f1, f1_micro | classes | F1 as the mean over the classes (macro); over all rows, where it is the accuracy |
| mean_absolute_error, pearsonr, spearmanr | numbers | error; correlation of values, of ranks |
| perplexity | texts | exp of the loss |
| chrf, bleu | written answers | of the corpus, 0 to 100 (sacrebleu's chrF2 and BLEU) |
| rouge | written answers | F1 as rouge1, rouge2, rougeL: the mean over the rows, 0 to 1 |
| exact_match | written answers | share that is the reference, but for space around it |
| final_number | written answers | share whose last number is the reference's last: GSM8K's flexible match |
| wer | written answers | word error rate of the corpus: edits by words of the references |
| reward_accuracy, reward_margin | preferences | share of pairs whose chosen answer is rewarded more; by how much |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, get_args

from veneer.train.data.extras import extra

OfClasses = Literal["accuracy", "f1", "f1_micro", "matthews_correlation"]
OfNumbers = Literal["mean_absolute_error", "pearsonr", "spearmanr"]
OfAnswers = Literal["chrf", "bleu", "rouge", "exact_match", "final_number", "wer"]
OfPairs = Literal["reward_accuracy", "reward_margin"]
Metric = OfClasses | OfNumbers | OfAnswers | OfPairs | Literal["perplexity"]

CLASSES, NUMBERS, PAIRS = get_args(OfClasses), get_args(OfNumbers), get_args(OfPairs)
WRITTEN = frozenset(get_args(OfAnswers))
"""Those that need answers to be written, which takes time: measured before and after, not while it trains."""


def of_classes(answers: Sequence[int], truths: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """Figures of predicted classes."""
    found = extra("sklearn.metrics")
    scores: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: found.accuracy_score(truths, answers),
        "f1": lambda: found.f1_score(truths, answers, average="macro", zero_division=0),
        "f1_micro": lambda: found.f1_score(truths, answers, average="micro"),
        "matthews_correlation": lambda: found.matthews_corrcoef(truths, answers),
    }
    return {name: float(scores[name]()) for name in names}


def of_numbers(answers: Sequence[float], truths: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Figures of predicted numbers; a correlation with answers that are all alike is 0."""
    stats = extra("scipy.stats")
    varied = len(set(answers)) > 1 and len(set(truths)) > 1
    scores: dict[str, Callable[[], Any]] = {
        "mean_absolute_error": lambda: sum(abs(a - t) for a, t in zip(answers, truths, strict=True)) / len(truths),
        "pearsonr": lambda: stats.pearsonr(answers, truths).statistic if varied else 0.0,
        "spearmanr": lambda: stats.spearmanr(answers, truths).statistic if varied else 0.0,
    }
    return {name: float(scores[name]()) for name in names}


def of_answers(answers: Sequence[str], references: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Figures of written answers."""
    found: dict[str, float] = {}
    for name in names:
        score = _OF_ANSWERS[name](list(answers), list(references))
        found |= score if isinstance(score, Mapping) else {name: float(score)}
    return found


def _rouge(answers: list[str], references: list[str]) -> dict[str, float]:
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = extra("rouge_score.rouge_scorer").RougeScorer(kinds)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


def _final(text: str) -> Decimal | None:
    """The last number of a text, without the commas between its thousands; a minus after a digit subtracts."""
    found = re.findall(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?", text)
    return Decimal(found[-1].replace(",", "")) if found else None


_OF_ANSWERS: dict[str, Callable[[list[str], list[str]], Any]] = {
    "chrf": lambda answers, references: extra("sacrebleu").corpus_chrf(answers, [references]).score,
    "bleu": lambda answers, references: extra("sacrebleu").corpus_bleu(answers, [references], force=True).score,
    "rouge": _rouge,
    "exact_match": lambda answers, references: (
        sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(references)
    ),
    "final_number": lambda answers, references: (
        sum(_final(a) == _final(r) is not None for a, r in zip(answers, references, strict=True)) / len(references)
    ),
    "wer": lambda answers, references: extra("jiwer").wer(references, answers),
}
