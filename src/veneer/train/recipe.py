"""A recipe: what to train, on what, how, and where the result goes. Five lines of YAML are enough.

    model: sample:smollm2
    method: LoRA
    data: conversations.jsonl
    training: {epochs: 1}
    output: runs/first

Every option changes the run or is refused. What is missing, misspelt or impossible is said all at once, each with its
line and the nearest name. `resolved` gives back the recipe with nothing left open, which repeats the run.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
import yaml
from pydantic import Field, create_model

from veneer.delta import Method
from veneer.errors import MethodError, RecipeError
from veneer.train import lines, method_sections
from veneer.train.data import Data
from veneer.train.method_sections import Section, method_options
from veneer.train.metrics import WRITTEN, Metric
from veneer.train.mistakes import said, there
from veneer.train.trackers import OFF, Tracker

Count = Annotated[int, Field(ge=1)]
EPOCHS = 3.0
"""Where a recipe names neither epochs nor steps."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ORDER = ("model", "method", "data", "training", "evaluation", "output", "record")


class Model(Section):
    """The frozen base.

    name: a transformers folder, a Hub id, or one that Veneer brings: sample:smollm2, sample:minilm,
        sample:flan-t5, sample:whisper.
    revision: of a Hub id.
    dtype: of the base's weights; "auto" is as they are stored. Adapters are float32.
    quantization: "nf4" stores the linears of the blocks in four bits by Veneer; "bitsandbytes-4bit" (NF4) and
        "bitsandbytes-8bit" (LLM.int8()) store those that transformers chooses, by bitsandbytes.
    """

    short: ClassVar[str] = "name"
    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "bitsandbytes-4bit", "bitsandbytes-8bit"] | None = None


class Training(Section):
    """How long, how fast, and what is kept.

    epochs, steps: one of the two; 3 epochs where neither is named.
    learning_rate: the peak, with AdamW; the method's own where none is named.
    head_learning_rate: the peak for a head that the model's files do not have, which is trained whole; learning_rate
        where none is named.
    optimizer: AdamW by a name that veneer.optimizer knows; "flat" and "paged" give the same weights, "paged" with its
        states on disk, beside the run, or in the host's memory; "adamw-8bit", "paged-bitsandbytes" are bitsandbytes'.
    dpo_beta: of preferences, how far the model may go from its base: the β of DPO, 0.1 where none is named.
    schedule: what follows the warm-up. warmup: the share of all steps in which the rate rises from zero.
    batch_size: examples of one optimizer step.
    micro_batch_size: examples that are computed at once; the rest is accumulated. "auto" is all of them, and half as
        many each time the memory does not hold them.
    group_by_length: batches of examples that are about as long, so that little is padding; where their lengths are
    known, unless it is false.
    gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
    loss: "chunked" never holds the logits of a whole batch, with the same numbers, and is refused where the model's
        loss is another; "whole" is the model's own; "auto" is chunked where the model allows it.
    cache_frozen: keep what the blocks below the lowest adapter compute, on disk, from the first epoch for the others.
    compile: train with the model's blocks compiled by torch.compile, for all lengths at once: the first steps take a
    minute or more, the others less than before. On a CPU it needs a C++ compiler.
    max_grad_norm: longer gradients are cut to it. lora_plus_ratio: B learns so many times faster than A (LoRA+).
    checkpoint_every: optimizer steps between checkpoints; ten a run where nothing is named. keep_checkpoints: the last.
    parallel: how several processes (torchrun, accelerate launch) share a run: each holds the whole model ("ddp"), or a
    part of each layer ("fsdp", FSDP2).
    trackers: who is told of loss and rate while it runs, by the names of transformers' integrations, as [tensorboard,
        wandb]; "none" is nobody.
    seed: chooses the start of the adapter, held-out rows, order and dropout.
    """

    epochs: Positive | None = None
    steps: Count | None = None
    learning_rate: Positive | None = None
    head_learning_rate: Positive | None = None
    optimizer: Literal["adamw", "flat", "paged", "paged-bitsandbytes", "adamw-8bit"] = "adamw"
    dpo_beta: Positive | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    batch_size: Count = 16
    micro_batch_size: Count | Literal["auto"] = "auto"
    group_by_length: bool | None = None
    gradient_checkpointing: bool = False
    loss: Literal["auto", "chunked", "whole"] = "auto"
    cache_frozen: bool = False
    compile: bool = False
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Positive = 1.0
    lora_plus_ratio: Positive | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
    parallel: Literal["ddp", "fsdp"] = "ddp"
    trackers: list[Tracker] = Field(default=["tensorboard"])
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps say the same thing twice; keep one")
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; an optimizer "
                "step is made of whole micro-batches"
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers {', '.join(self.trackers)} names one twice; keep one")
        return self

    def steps_over(self, rows: int) -> int:
        """The optimizer steps of its epochs over so many rows; the last one of an epoch may be shorter."""
        return math.ceil((self.epochs or EPOCHS) * math.ceil(rows / self.batch_size))


class Evaluation(Section):
    """What is measured on the held-out rows, and when.

    every: optimizer steps between two evaluations; ten a run where nothing is named.
    patience: stop after so many evaluations without a lower loss (early stopping).
    keep: the adapter at the end is the last one, or the one with the lowest held-out loss.
    metrics: what is measured beside the loss, as `veneer.train.metrics` says; accuracy and F1 of classes, the mean
        absolute error of numbers, perplexity of texts, reward accuracy of preferences where none are named.
    max_new_tokens: how long an answer that is scored may be. limit: how many held-out rows are answered.
    """

    every: Count | None = None
    patience: Count | None = None
    keep: Literal["last", "best"] = "last"
    metrics: Annotated[list[Metric], Field(min_length=1)] | None = None
    max_new_tokens: Count = 64
    limit: Count = 100

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Evaluation:
        idle = {"max_new_tokens", "limit"} & self.model_fields_set
        if idle and not set(self.metrics or ()) & WRITTEN:
            raise ValueError(
                f"{' and '.join(sorted(idle))} without metrics of written answers ({', '.join(sorted(WRITTEN))}) "
                "changes nothing; name one, or leave it"
            )
        return self


class Record(Section):
    """What a finished run was made with. Data that are no longer the same are refused, other versions are told."""

    versions: dict[str, str]
    git: str | None = None
    data_fingerprint: str
    task: str
    labels: list[str] | None = None
    steps: int


class Recipe(Section):
    """A whole recipe; `read` makes it from YAML, so that errors have lines."""

    model: Model
    method: Any
    data: Data
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    output: Annotated[str, Field(min_length=1)]
    record: Record | None = None

    def methods(self) -> Mapping[str, tuple[Method, ...]]:
        """`where` -> methods, as `veneer.attach` takes them."""
        return method_sections.by_place(self.method)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the recipe's, or the lowest that one of its methods likes."""
        rates = map(method_sections.learning_rate, itertools.chain(*self.methods().values()))
        return self.training.learning_rate or min(rates)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, nothing left open but what was left to the run."""
        found = self.model_dump(mode="json", exclude_none=True, exclude={"method", "data"})
        found["method"] = method_sections.plain(self.method)
        found["data"] = self.data.model_dump(
            mode="json", exclude_unset=True, exclude_none=True
        )  # it minds what is told
        if not set(self.evaluation.metrics or ()) & WRITTEN:
            for idle in ("max_new_tokens", "limit"):
                del found["evaluation"][idle]
        return {name: found[name] for name in ORDER if name in found}

    def yaml(self) -> str:
        """As `read` takes it."""
        return yaml.safe_dump(json.loads(json.dumps(self.as_dict())), sort_keys=False, allow_unicode=True, width=100)


@cache
def _whole() -> type[Recipe]:
    """The recipe with the section of methods in place, which exists once all methods are imported."""
    return create_model("Recipe", __base__=Recipe, method=(method_sections.section(), ...))


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, with the short forms that `read` takes; docs/recipe.schema.json holds it."""
    found = _whole().model_json_schema()
    properties, names = found["properties"], sorted(method_options())
    properties["model"] = {"anyOf": [{"type": "string"}, properties["model"]]}
    properties["method"] = {"anyOf": [{"enum": names}, properties["method"]]}
    texts = {"type": "array", "items": {"type": "string"}}
    properties["data"] = {"anyOf": [{"type": "string"}, texts, properties["data"]]}
    training, told = found["$defs"]["Training"]["properties"], {"enum": [*get_args(Tracker), OFF]}
    training["trackers"] = {"anyOf": [told, training["trackers"]]}
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return found


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with `key=value` on top; RecipeError with a line for each mistake."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}. See: veneer recipes list") from None
    recipe = read(text, str(path), overrides)
    return recipe.model_copy(update={"data": recipe.data.below(Path(path).parent)})


def read(text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a text, with `key=value` on top; RecipeError with a line for each mistake."""
    found = lines.read(text, name)
    problems = []
    _lengthen(found.data)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problems.append(f"'{override}' is no key=value, such as training.learning_rate=1e-4.")
            continue
        found.put(tuple(key.split(".")), lines.scalar(value), f"'{override}'")
        _lengthen(found.data)
    try:
        recipe = _whole().model_validate_json(json.dumps(found.data), strict=True)
    except pydantic.ValidationError as error:
        problems += [said(one, found, _whole()) for one in error.errors(include_url=False)]
    except RecursionError:
        problems.append(f"{name} contains itself. Write it out.")
    else:
        problems += _checked(recipe, found)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    return recipe


def _lengthen(data: Any) -> None:
    """Short forms as what they stand for."""
    if isinstance(data.get("model"), str):
        data["model"] = {Model.short: data["model"]}
    if "method" in data:
        data["method"] = method_sections.lengthened(data["method"])
    if isinstance(data.get("data"), str | list):
        data["data"] = {"path": data["data"]}
    training = data.get("training")
    if isinstance(training, dict) and isinstance(told := training.get("trackers"), str | list):
        training["trackers"] = [] if told in (OFF, [OFF]) else [told] if isinstance(told, str) else told


def _checked(recipe: Recipe, found: lines.Lined) -> Iterable[str]:
    """What only the methods themselves can say."""
    chosen = dict(method_sections.named(recipe.method))
    if not chosen:
        yield f"{found.line(('method',))}: no method is named.{there(method_options())}"
    if "AdapterFusion" in chosen and len(chosen) > 1:
        others = ", ".join(sorted(chosen.keys() - {"AdapterFusion"}))
        yield f"{found.line(('method',))}: AdapterFusion stands alone; train {others} in another run."
    for name, options in chosen.items():
        try:
            method_sections.built(name, options)
        except MethodError as error:
            yield f"{found.line(('method', name))}: {error}"
