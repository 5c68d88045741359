"""`samestep parity`: which variants its options mean, and which options are refused before anything starts."""

from pathlib import Path

import pytest

from launch.cli import main
from launch.command import RunOptions
from launch.parity_plan import Variant, plan_parity
from trainer.errors import ConfigError

RECIPE = "recipes/lora_sst2.py"


def labels(backends: str, processes: str, split: str = "", precision: str = "no") -> list[str]:
    return [variant.label for variant in plan_parity(backends, processes, split, precision)]


def test_the_reference_comes_first_and_single_runs_on_one_process() -> None:
    assert labels("single,ddp", "1,2,3") == ["single x1", "ddp x2", "ddp x3"]


def test_bf16_is_measured_against_single_in_fp32_and_in_bf16() -> None:
    assert labels("single,fsdp", "2", precision="bf16") == ["single x1", "single x1 bf16", "fsdp x2 bf16"]


def test_a_split_is_that_of_a_rank_and_single_takes_the_same_micro_batches_of_the_same_global_batch() -> None:
    assert labels("single,ddp", "2", "4x4,16x1") == [
        *("single x1", "single x1 4x8", "single x1 16x2", "ddp x2 4x4", "ddp x2 16x1"),
    ]
    assert {variant.global_batch for variant in plan_parity("single,ddp", "1,2", "4x4,16x1", "no")} == {32}
    assert labels("single", "2", "4x4,16x1") == ["single x1", "single x1 4x4", "single x1 16x1"]
    assert {variant.global_batch for variant in plan_parity("single", "2", "4x4,16x1", "no")} == {16}


def test_a_variant_is_started_with_its_own_sizes() -> None:
    options = Variant("ddp", 2, 4, 32).run_options(RunOptions(Path(RECIPE), overrides=("train.seed=1",)))
    assert (options.backend, options.processes, options.precision) == ("ddp", 2, "no")
    assert options.overrides == ("train.seed=1", "train.global_batch_size=32", "train.micro_batch_size=4")


def test_variant_label_names_backend_processes_split_and_precision() -> None:
    assert Variant("zero3", 2, 4, 32, "bf16").label == "zero3 x2 4x4 bf16"
    assert Path(Variant("zero3", 2).label.replace(" ", "_")).name == "zero3_x2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("single", "2"), "--backends (single): nothing to compare"),
        ((",", "2"), "--backends (,): nothing to compare"),
        (("single", "2", "", "bf16"), "--backends (single): nothing to compare"),
        (("single,ddp,fsdp", "1"), "--processes (1): one process is single; the other backends need 2 or more"),
        (("ddp", "2,3", "4x4"), "must give one global batch, but gives 32 (4x4 on 2), 48 (4x4 on 3)"),
        (("ddp", "2", "4x4,8x4"), "must give one global batch, but gives 32 (4x4 on 2), 64 (8x4 on 2)"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        labels(*options)
    assert words in str(caught.value)


@pytest.mark.parametrize("by", ["file", "command line"])
def test_sizes_that_a_split_would_overrule_are_refused(
    by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's as those of the command line; the recipe's own sizes are what a split is there to change."""
    file = tmp_path / "sizes.yaml"
    file.write_text("train: {global_batch_size: 8, micro_batch_size: 2}\n")
    given = ["--config", str(file)] if by == "file" else ["train.global_batch_size=8", "train.micro_batch_size=2"]
    with pytest.raises(SystemExit) as caught:
        main(["parity", RECIPE, "--backends", "ddp", "--split", "4x4,16x1", *given])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    source = str(file) if by == "file" else by
    assert f"train.global_batch_size (8) by {source}: --split decides it and makes it 32; leave one of the two" in said
    assert f"train.micro_batch_size (2) by {source}: --split decides it; leave one of the two out" in said
