"""Speech to text: Whisper and other models whose decoder writes what their encoder hears."""

from __future__ import annotations

from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from veneer.train.metrics import WRITTEN
from veneer.train.tasks.seq2seq import ask
from veneer.train.tasks.task import Task, counted, perplexity

SPEECH = Task(
    "speech",
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    metrics=("perplexity", *sorted(WRITTEN)),
    usual=("perplexity",),
    scored=counted,
    figures=perplexity,
    ask=ask,
)
