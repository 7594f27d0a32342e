"""What every training of ours asks of transformers' Trainer, whoever sets it up."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments


def arguments(**options: Any) -> TrainingArguments:
    """TrainingArguments that log every step as it is, write to no tracker, and draw no bar of their own."""
    gpu = torch.accelerator.is_available()
    return TrainingArguments(
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",  # a tracker of its own would choose another folder
        disable_tqdm=True,
        **options,
    )
