"""Who is told of loss and rate while a run goes: TensorBoard in its folder, others as transformers integrates them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from transformers.integrations.integration_utils import TensorBoardCallback

from veneer.errors import RecipeError
from veneer.train.data.extras import extra

Tracker = Literal[
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow", "neptune", "swanlab",
    "tensorboard", "trackio", "wandb",
]  # fmt: skip
"""The names that transformers has for them; it tells Kubeflow unasked, wherever that runs it."""
OFF = "none"
_PACKAGES = {"azure_ml": ("azureml", "azureml-sdk"), "comet_ml": ("comet_ml", "comet-ml"), "flyte": ("flytekit",) * 2}
"""The module and the package of those that are not called as their tracker is."""


def refuse_missing(names: Iterable[Tracker]) -> None:
    """RecipeError for trackers that are not installed, before anything is computed."""
    missing = []
    for name in names:
        if name == "tensorboard":
            extra("tensorboard")
            continue
        module, package = _PACKAGES.get(name, (name, name))
        if find_spec(module) is None:
            missing.append(f"training.trackers: {name} is not installed. Run: pip install {package}")
    if missing:
        raise RecipeError("\n".join(missing))


def told_by_trainer(names: Iterable[Tracker]) -> list[str]:
    """Those that a Trainer sets up by itself, as its `report_to`."""
    return [name for name in names if name != "tensorboard"]


def tensorboard(names: Iterable[Tracker], folder: Path) -> list[TensorBoardCallback]:
    """What writes for TensorBoard into this folder, where it is named; a Trainer's own would choose another."""
    if "tensorboard" not in names:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(folder)))]
