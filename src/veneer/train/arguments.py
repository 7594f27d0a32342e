"""What every training of ours asks of transformers' Trainer, whoever sets it up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainingArguments


def arguments(*, report_to: Sequence[str] = (), **options: Any) -> TrainingArguments:
    """TrainingArguments that log every step as it is, tell the trackers of `report_to`, and draw no bar."""
    gpu = torch.accelerator.is_available()
    return TrainingArguments(
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(report_to),
        disable_tqdm=True,
        **options,
    )
