"""Values are read by their field's type, later layers win, and the source of each value is known."""

from pathlib import Path
from typing import Any, Literal

import pytest

from tests.resolve.cases import DEFAULTS, FULL, problems_of, resolved, value_of, write
from trainer.config import FullConfig, HeadConfig, LoraConfig
from trainer.resolve.values import Text, read_value

VALUES = [
    ("optim.peak_lr", "1e-4", 1e-4),
    ("optim.peak_lr", "3", 3.0),
    ("optim.peak_lr", "none", None),
    ("optim.max_grad_norm", "null", None),
    ("train.max_skipped_steps", "1e1", 10),
    ("train.seed", "-3", -3),
    ("data.group_by_length", "no", False),
    ("data.group_by_length", "off", False),
    ("model.gradient_checkpointing", "yes", True),
    ("model.gradient_checkpointing", "true", True),
    ("model.gradient_checkpointing", "On", True),
    ("data.text", "none", "none"),
    ("data.text", "no", "no"),
    ("data.text", "3", "3"),
    ("data.text_pair", "none", None),
    ("data.text_pair", '"none"', "none"),
    ("data.text", "a: b # c", "a: b # c"),
    ("data.labels", "no,yes", ("no", "yes")),
    ("data.labels", "[no, yes]", ("no", "yes")),
    ("data.labels", '["a, b", none]', ("a, b", "none")),
    ("data.labels", "none", None),
    ("optim.betas", "0.8, 0.9", (0.8, 0.9)),
    ("method.targets", "query,key", ("query", "key")),
    ("method.targets", "all-linear", "all-linear"),
    ("method.targets", "query", ("query",)),
    ("train.metric", "f1", "f1"),
    ("run_dir", "some/where", Path("some/where")),
    ("run_dir", "none", None),
]


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_argument_is_read_by_the_type_of_its_field(key: str, text: str, value: object) -> None:
    assert value_of(f"{key}={text}") == value


@pytest.mark.parametrize(("key", "text", "value"), [row for row in VALUES if "#" not in row[1]])
def test_yaml_reads_a_value_like_the_command_line(tmp_path: Path, key: str, text: str, value: object) -> None:
    section, _, last = key.rpartition(".")
    if "," in text and not text.startswith("["):
        text = f"'{text}'"
    document = f"{section}:\n  {last}: {text}\n" if section else f"{last}: {text}\n"
    config: Any = resolved("--config", write(tmp_path / "x.yaml", document)).config
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value


def test_literal_named_no_is_text() -> None:
    assert read_value(Literal["no", "bf16"], Text("no")) == "no"
    assert read_value(Literal["none", "all"] | None, Text("none")) == "none"


def test_later_layers_win_and_every_source_is_known(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {peak_lr: 1, eps: 1e-7}\ntrain:\n  seed: 1\n")
    second = write(tmp_path / "b.yaml", "optim:\n  peak_lr: 2\ntrain.log_every: 5\n")
    result = resolved("train.seed=3", "--config", first, f"--config={second}")
    assert (result.config.optim.peak_lr, result.config.optim.eps, result.config.train.seed) == (2.0, 1e-7, 3)
    assert result.config.train.log_every == 5
    assert result.sources["optim.eps"] == first
    assert result.sources["optim.peak_lr"] == result.sources["train.log_every"] == second
    assert result.sources["train.seed"] == "command line"
    assert result.sources["method.rank"] == result.sources["method.name"] == "recipe"
    assert result.sources["method.alpha"] == result.sources["data.source"] == "default"


def test_empty_files_sections_anchors_and_mappings_are_fine(tmp_path: Path) -> None:
    empty = write(tmp_path / "a.yaml", "# nothing\n")
    text = "data:\ntrain: {seed: &x 7, log_every: *x}\nprobe: null\n"
    config = resolved("--config", empty, "--config", write(tmp_path / "b.yaml", text)).config
    assert (config.train.seed, config.train.log_every, config.probe) == (7, 7, None)


def test_another_method_starts_from_its_own_defaults() -> None:
    assert resolved("method=full").config.method == FullConfig()
    assert resolved("method.name=head").config.method == HeadConfig()
    assert resolved("method.name=lora", "method.alpha=2", defaults=FULL).config.method == LoraConfig(alpha=2)
    assert resolved("method.name=lora").config.method == DEFAULTS.method


def test_a_later_switch_of_method_drops_the_settings_of_the_earlier_one(tmp_path: Path) -> None:
    lora = write(tmp_path / "lora.yaml", "method: {name: lora, rank: 64}\n")
    assert resolved("--config", lora, "method=full").config.method == FullConfig()
    assert resolved("--config", lora, "method=lora", defaults=FULL).config.method == LoraConfig(rank=64)
    only_rank = write(tmp_path / "rank.yaml", "method: {rank: 64}\n")
    assert resolved("--config", only_rank, "method=lora", defaults=FULL).config.method == LoraConfig(rank=64)


def test_optional_section_comes_and_goes(tmp_path: Path) -> None:
    probing = write(tmp_path / "a.yaml", "probe: {folder: x}\n")
    assert resolved("--config", probing, "probe.steps=2").config.probe is not None
    assert resolved("--config", probing, "probe=none").config.probe is None
    (problem,) = problems_of("probe.steps=3")
    assert "probe.folder: must be set" in problem
