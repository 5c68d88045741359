"""A rule that pydantic cannot see: settings without effect."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import ClassificationData, RunConfig, StreamData
from trainer.config.augment import MODEL_KINDS, TEXT_KINDS, WORD_KINDS, AugmentKind
from trainer.config.data import ObjectiveName
from trainer.resolve.merge import Merged

FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def without_effect(config: RunConfig, merged: Merged, usual_values: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Settings by YAML or command line that another setting of the same or an earlier layer makes idle.

    A value that is the default or the recipe's own is let pass, so that a printed config can be given back as --config.
    """
    problems = []
    for name, controllers, is_idle, why in _IDLE:
        setting = merged.origins.get(name)
        if setting is None or merged.values[name] in usual_values.get(name, ()):
            continue
        deciders = [merged.origins[controller] for controller in controllers if controller in merged.origins]
        overruled_later = any(decider.layer > setting.layer for decider in deciders)
        if not overruled_later and is_idle(config):
            problems.append(setting.problem(f"has no effect {why}; leave it out"))
    return problems


def _hub(config: RunConfig) -> bool:
    source = getattr(config.data, "source", "asset:")  # token datasets have several, and no subset
    return not source.startswith("asset:") and Path(source).suffix not in FILE_SUFFIXES


Rule = tuple[str, tuple[str, ...], Callable[[RunConfig], bool], str]


def _needs_augmentation(setting: str, *kinds: AugmentKind) -> Rule:
    """A setting of data.augment that these kinds alone read."""

    def is_idle(config: RunConfig) -> bool:
        return isinstance(config.data, ClassificationData) and not set(config.data.augment.kinds) & set(kinds)

    return (
        f"data.augment.{setting}",
        ("data.augment.kinds",),
        is_idle,
        f"unless data.augment.kinds has {' or '.join(kinds)}",
    )


def _needs_objective(setting: str, *objectives: ObjectiveName) -> Rule:
    """A setting of token datasets that these objectives alone read."""

    def is_idle(config: RunConfig) -> bool:
        return isinstance(config.data, StreamData) and config.data.objective not in objectives

    return (f"data.{setting}", ("data.objective",), is_idle, f"unless data.objective is {' or '.join(objectives)}")


def _needs_policy(setting: str, policy: str) -> Rule:
    """A cap that counts what this policy did, for either kind of bad step."""

    def is_idle(config: RunConfig) -> bool:
        return policy not in (config.train.on_nonfinite, config.train.on_spike)

    deciders = ("train.on_nonfinite", "train.on_spike")
    return (f"train.{setting}", deciders, is_idle, f"unless {' or '.join(deciders)} is {policy}")


OBJECTIVES_WITH_NOISE: tuple[ObjectiveName, ...] = ("mlm", "mlm_nsp", "mlm_sop", "span_corruption", "infilling", "plm")

_IDLE: tuple[Rule, ...] = (
    (
        "data.validation_fraction",
        ("data.validation",),
        lambda config: getattr(config.data, "validation", None) is not None,
        "where data.validation names a split",
    ),
    (
        "data.test_fraction",
        ("data.test",),
        lambda config: getattr(config.data, "test", None) is not None,
        "where data.test names a split",
    ),
    (
        "data.label_separator",
        ("data.target",),
        lambda config: getattr(config.data, "target", None) != "multi",
        "unless data.target=multi",
    ),
    _needs_objective("noise_fraction", *OBJECTIVES_WITH_NOISE),
    _needs_objective("mean_span", "span_corruption", "infilling"),
    _needs_objective("whole_words", "mlm", "mlm_nsp", "mlm_sop"),
    ("data.subset", ("data.source",), lambda config: not _hub(config), "unless data.source is a hub dataset"),
    (
        "optim.min_lr_fraction",
        ("optim.schedule",),
        lambda config: config.optim.schedule == "constant",
        "with optim.schedule=constant",
    ),
    (
        "optim.layer_decay",
        ("method.name",),
        lambda config: config.method.name == "head",
        "with method.name=head, which trains no layer",
    ),
    _needs_policy("max_skipped_steps", "skip"),
    _needs_policy("max_rollbacks", "rollback"),
    (
        "train.spike_factor",
        ("train.on_spike",),
        lambda config: config.train.on_spike == "ignore",
        "with train.on_spike=ignore",
    ),
    (
        "model.gradient_checkpointing",
        ("method.name",),
        lambda config: config.method.name == "head",
        "with method.name=head, whose encoder needs no backward pass",
    ),
    _needs_augmentation("probability", *TEXT_KINDS),
    _needs_augmentation("fraction", *WORD_KINDS),
    _needs_augmentation("synonyms", "synonyms", "insert"),
    *(
        _needs_augmentation(setting, kind)
        for kind, models in MODEL_KINDS.items()
        for model in models
        for setting in (model, f"{model}_prefix")
    ),
    _needs_augmentation("mixup_alpha", "mixup"),
)
"""(setting, the settings that may make it idle, when they do, why)."""
