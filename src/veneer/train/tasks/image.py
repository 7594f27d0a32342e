"""Images with a class: ViT, DINOv2 and what else transformers classifies images with."""

from __future__ import annotations

from transformers import AutoImageProcessor, AutoModelForImageClassification

from veneer.train import metrics
from veneer.train.tasks.classification import classes, named, scored
from veneer.train.tasks.task import Task

IMAGE = Task(
    "image_classification",
    AutoModelForImageClassification,
    AutoImageProcessor,
    metrics=metrics.CLASSES,
    usual=("accuracy", "f1"),
    scored=scored,
    figures=classes,
    options=lambda labels: named(labels) | {"ignore_mismatched_sizes": True},  # a head of other classes
)
