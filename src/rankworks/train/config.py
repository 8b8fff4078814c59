"""The configuration of a run: one YAML file, the same names in Python, `key=value` overrides on the command line.

model: {name: smollm2-135m, dtype: float32}
data: {name: bbc-news, max_length: 128}
adapt: {delta: lora, rank: 16, alpha: 32, targets: all-linear}
optim: {name: adamw, lr: 5.0e-4, schedule: cosine, warmup: 0.03}
train: {steps: 40, batch_size: 8, seed: 0}
output: runs/bbc
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from rankworks.core.config import Config, read
from rankworks.core.errors import ConfigError, RankworksError, UnknownNameError
from rankworks.core.hub.byte_level import BYTES
from rankworks.core.registry import build, get, methods
from rankworks.train.precision import Precision
from rankworks.train.quantising import QuantiseConfig
from rankworks.train.sources.config import DataConfig

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Config):
    """Which model: a sample name, a local folder or a hub id."""

    name: str = Field(description="sample name, local folder or hub id")
    start: Literal["pretrained", "random"] = Field(
        default="pretrained", description="random: new weights; then name may be a shape, e.g. llama-60m"
    )
    tokenizer: str | None = Field(
        default=None, description="model whose tokenizer is taken, or bytes; by default its own"
    )
    shape: dict[str, Any] | None = Field(
        default=None, description="start: random: settings of the model that are replaced, e.g. {hidden_size: 256}"
    )
    dtype: Dtype = Field(default="float32", description="type of the base weights")
    quantise: QuantiseConfig | None = Field(
        default=None, description="the frozen base is quantised first: nf4, int8, ... or a block; see train.quantising"
    )
    device: str | None = Field(default=None, description="cpu, cuda, mps, ...; by default the fastest there is")
    task: Literal["causal-lm", "classification"] = Field(
        default="causal-lm", description="classification: a head of classes"
    )

    @model_validator(mode="after")
    def _new(self) -> ModelConfig:
        for name, asked in (("shape", bool(self.shape)), ("tokenizer", self.tokenizer == BYTES)):
            if asked and self.start != "random":
                raise ValueError(f"{name} makes another model, which has no weights yet: give start: random with it")
        return self


QUANTISED_WHOLE = "model.quantise is for a base that stays frozen, and the whole model would be trained: leave one out"

Auto = Literal["auto"]
AUTO: Auto = "auto"
"""A learning rate that is measured at the start of the run; see train/rates/rate.py."""

CALIBRATED = ("adamw", "adam")
"""Optimizers for which the measured rate was held against sweeps."""


class OptimConfig(Config):
    """The optimizer and its schedule."""

    name: str = Field(default="adamw", description="a registered optimizer")
    lr: float | Auto = Field(
        default=2e-4, description="peak learning rate; auto: measured at the start, see docs/auto-rate.md"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how the rate falls after the warmup"
    )
    warmup: float = Field(
        default=0.03, ge=0, description="linear rise: a fraction of all steps below 1, a number of steps from 1 on"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled decay of matrices; vectors have none")
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of the gradient; null leaves it alone")
    layerwise: bool = Field(
        default=False, description="step in the backward pass and free each gradient: less memory, see train.layerwise"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="the optimizer's own settings, which may also be written beside its name"
    )

    @field_validator("lr", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        """Refuse in one sentence: a choice of types would be refused in one for each."""
        number: Any = float(value) if isinstance(value, str) and _number(value) != value else value  # "1e-3"
        proper = isinstance(number, int | float) and not isinstance(number, bool)
        if number == AUTO or (proper and 0 < number < math.inf):
            return number
        raise ValueError("a learning rate is a number above 0, or auto")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return get("optimizer", value).key
        except UnknownNameError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, values: Any) -> Any:
        """Put settings of the optimizer that stand beside its name, `{name: sgd, momentum: 0.9}`, into `options`."""
        if not isinstance(values, Mapping) or not isinstance(values.get("options", {}), Mapping):
            return values
        known = {m.key: m for m in methods("optimizer")}.get(values.get("name", "adamw"))
        theirs = known.cls.accepted(values) if known is not None else []  # type: ignore[attr-defined]
        beside = {k: v for k, v in values.items() if k in theirs and k not in cls.model_fields}
        kept = {k: v for k, v in values.items() if k not in beside}
        return {**kept, "options": {**values.get("options", {}), **beside}} if beside else kept

    @model_validator(mode="after")
    def _read(self) -> OptimConfig:
        """Read the settings as the optimizer will."""
        try:
            build("optimizer", self.name, **self.settings())
        except RankworksError as error:
            raise ValueError(str(error)) from None
        if self.lr == AUTO:
            refuse_auto(self.name)
        return self

    @property
    def rate(self) -> float:
        """The learning rate as a number. Raises `ConfigError` where it is yet to be measured."""
        if self.lr == AUTO:
            raise ConfigError("lr: auto is measured by a run or a comparison: give a number here, e.g. 2e-4.")
        return float(self.lr)

    def settings(self) -> dict[str, Any]:
        """Return the settings for `make_optimizer` besides name and lr."""
        return {"weight_decay": self.weight_decay, **self.options}


def refuse_auto(optimizer: str) -> None:
    """Raise `ValueError` where `lr: auto` was not calibrated for an optimizer, naming what to do instead."""
    if optimizer not in CALIBRATED:
        raise ValueError(
            f"lr: auto holds for {' and '.join(CALIBRATED)}, for which it was calibrated, not for {optimizer}: give "
            f"lr a number, or find it by `rankworks compare` with an entry {{optimizer: {optimizer}}} in methods."
        )


class TrainConfig(Config):
    """The loop. A step is one update of the optimizer, on batch_size x accumulate examples over all processes."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; give this or epochs")
    epochs: float | None = Field(default=None, gt=0, description="passes over the training data; give this or steps")
    batch_size: int = Field(default=8, ge=1, description="examples of one micro-batch, over all processes together")
    accumulate: int = Field(default=1, ge=1, description="micro-batches per step")
    seed: int = Field(default=0, ge=0, description="order of the data, dropout and the start of the adapter")
    packing: bool | Literal["auto"] = Field(
        default="auto", description="several examples in a row; auto: where the model keeps them apart"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, slower"
    )
    precision: Precision = Field(
        default="float32",
        description="bf16: autocast, weights keep model.dtype; auto: where the device has such products",
    )
    compile: bool = Field(default=False, description="torch.compile the model: slow start, faster steps")
    loss_chunk_mib: int = Field(default=128, ge=1, description="upper bound of the logits that exist at once")
    eval_every: int | None = Field(default=None, ge=1, description="steps between evaluations on the validation data")
    save_every: int | None = Field(default=200, ge=1, description="steps between checkpoints; null writes none")
    keep: int = Field(default=2, ge=1, description="how many checkpoints stay")
    log_every: int = Field(default=1, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(default=False, description="also write TensorBoard events")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    def total_steps(self, examples: int) -> int:
        """Return how many steps the run has on so many examples (one epoch where neither steps nor epochs is given)."""
        if self.steps is not None:
            return self.steps
        whole = self.batch_size * self.accumulate
        return max(1, math.ceil((self.epochs or 1.0) * examples / whole - 1e-9))


class CalibrateConfig(Config):
    """What is measured on the training data before adapting, for methods that start from data; nothing for others."""

    batches: int = Field(default=8, ge=1, description="batches of train.batch_size examples")


class SearchConfig(Config):
    """How a selection that must search (flexora, diffora) does so before the run; nothing for others."""

    steps: int | None = Field(default=None, ge=1, description="steps of the adapter; null: as many as the run has")
    lr: float | None = Field(default=None, gt=0, description="peak rate of the adapter meanwhile; null: optim.lr")
    scores_lr: float = Field(default=1e-2, gt=0, description="Adam's rate for the scores")
    valid: float = Field(
        default=0.2, gt=0, lt=1, description="share of the training data held out for the scores; the run has it again"
    )
    batches: int = Field(default=1, ge=1, description="held-out batches of train.batch_size per step of the scores")


class EvaluateConfig(Config):
    """What is measured before and after training: on the test data, or where there are none on the training data."""

    limit: int | None = Field(default=200, ge=1, description="records, each class in its share; null for all")
    scoring: Literal["auto", "first", "sum", "mean"] = Field(
        default="auto", description="likelihood of a label, see train.evaluate"
    )
    exact_match: bool = Field(default=True, description="completion data: generate answers and compare them")
    compare: Literal["auto", "whole", "last-number", "final"] = Field(default="auto", description="what must be equal")
    max_new_tokens: int = Field(default=64, ge=1, description="longest generated answer")
    batch_tokens: int = Field(default=4096, ge=1, description="tokens evaluated at once")
    examples: int = Field(default=3, ge=0, description="prompts whose answers are shown before and after")


class RunConfig(Config):
    """Everything a run needs."""

    model: ModelConfig | None = Field(default=None, description="the base model")
    data: DataConfig | None = Field(default=None, description="what it learns from")
    adapt: dict[str, Any] | None = Field(
        default_factory=lambda: {"delta": "lora"},
        description="delta, targets, init and the settings of the method; none: the whole model is trained",
    )
    calibrate: CalibrateConfig = Field(
        default_factory=lambda: CalibrateConfig(), description="what is measured on data before adapting"
    )
    search: SearchConfig = Field(
        default_factory=lambda: SearchConfig(), description="how a selection searches before the run"
    )
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig())
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    output: str | None = Field(default=None, description="folder for the adapter, checkpoints, metrics and the result")

    @field_validator("adapt", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """YAML's `none` is a word, its `null` is not: both mean no adapter."""
        return None if value == "none" else value

    @model_validator(mode="after")
    def _frozen(self) -> RunConfig:
        if self.adapt is None and self.model is not None and self.model.quantise is not None:
            raise ValueError(QUANTISED_WHOLE)
        return self


def load_config(source: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a YAML file, a mapping or a `RunConfig`, with `key=value` overrides applied.

    Keys are dotted (`optim.lr=1e-3`), values are read as YAML. Raises `ConfigError` with every problem at once.
    """
    values, where = read_values(source, overrides)
    return read(RunConfig, values, where)


def read_values(
    source: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """Return the plain values of a configuration with overrides applied, and the path they came from, or nothing."""
    where = ""
    if isinstance(source, RunConfig):
        values: dict[str, Any] = source.model_dump()
    elif isinstance(source, Mapping):
        values = dict(source)
    else:
        where = str(source)
        values = _read_yaml(Path(source))
    return override(values, overrides), where


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of nested `values` with each `dotted.key=value` set."""
    result = _copy(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r} is not an override: write key=value, e.g. optim.lr=1e-3.")
        *path, last = key.strip().split(".")
        here = result
        for part in path:
            inner = here.get(part)
            here[part] = inner = {} if inner is None else inner
            if not isinstance(inner, dict):
                raise ConfigError(f"{text!r}: {part!r} is a value and has no settings of its own.")
            here = inner
        here[last] = yaml_value(value)
    return result


def yaml_value(text: str) -> Any:
    """Return a YAML-typed value; `1e-3`, a string to YAML 1.1, is a number here."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not a YAML value: {error}") from None
    return _number(value)


def _number(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in "+-.0123456789" and value:
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    return value


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with model, data, adapt, optim, train and output.")
    return _number(values)
