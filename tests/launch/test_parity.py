"""`samestep parity`: how it judges and reports, and real launches of the recipes' own steps on several processes."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launch.parity import Record, largest_relative, relative_distance, report
from launch.parity_plan import Variant
from tests.data.test_instruct import chats
from tests.data.test_templates import tokenizer
from tests.launch.test_template import tiny_chat_model
from tests.tiny import tiny_bert, tiny_sentences, tiny_writer

ROOT = Path(__file__).parents[2]
PLAN = [Variant("single"), Variant("ddp", 2)]
PLAN_BF16 = [Variant("single"), Variant("single", precision="bf16"), Variant("ddp", 2, precision="bf16")]


def made(label: str, *, ranks: int = 1, off: float = 0.0, **changes: Any) -> Record:
    """A record of two steps. off: how far gradient and update are from the reference's; changes: of step 2."""
    targets = [[18.0], [6.0, 12.0]][ranks - 1]
    step = {"loss": 0.5, "grad_norm": 1.0, "lr": 1e-3, "samples": "a", "targets_per_rank": targets}
    facts = {"weights_before": "w", "world_size": ranks, "steps": [step, step | changes]}
    tensors = {name: np.array([1.0 + off, 0.0], "f4") for name in ("gradient.w", "update.w")}
    return Record(label, facts, tensors)


def reported(variants: list[Variant], *others: Record) -> tuple[int, str]:
    """Exit code, and what is on the screen."""
    screen = io.StringIO()
    code = report(variants, [made("single x1"), *others], Console(file=screen, width=200))
    return code, screen.getvalue()


def test_variants_that_agree_end_with_code_0() -> None:
    code, screen = reported(PLAN, made("ddp x2", ranks=2, loss=0.5 * (1 + 5e-6)))
    assert (code, "parity: every variant takes the same steps" in screen) == (0, True)
    assert "ddp x2" in screen and "5.0e-06" in screen


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": 0.51}, "differs: loss"),
        ({"grad_norm": 1.1}, "differs: grad_norm"),
        ({"off": 2e-5}, "differs: gradient"),
        ({"loss": float("nan")}, "differs: loss"),
        ({"lr": 2e-3}, "learning rates differ"),
        ({"samples": "b"}, "samples differ"),
        ({"targets_per_rank": [9.0, 9.0]}, "same number of targets in step 2"),
        ({"targets_per_rank": [6.0, 11.0]}, "numbers of targets differ"),
    ],
)
def test_a_variant_that_disagrees_is_named_in_the_table_and_ends_with_code_1(
    changes: dict[str, Any], words: str
) -> None:
    code, screen = reported(PLAN, made("ddp x2", ranks=2, **changes))
    assert (code, "parity: FAILED for ddp x2" in screen) == (1, True)
    (row,) = (line for line in screen.splitlines() if line.startswith("\u2502 ddp x2"))
    assert words in row


def test_in_bf16_a_backend_may_be_half_again_as_far_from_fp32_as_single_is() -> None:
    single = made("single x1 bf16", off=0.02)
    assert reported(PLAN_BF16, single, made("ddp x2 bf16", ranks=2, off=0.029))[0] == 0
    code, screen = reported(PLAN_BF16, single, made("ddp x2 bf16", ranks=2, off=0.031))
    assert (code, "differs: gradient, update" in screen) == (1, True)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_in_bf16_a_wrong_loss_or_norm_is_found_in_single_too(name: str) -> None:
    sound = made("single x1 bf16", off=0.02), made("ddp x2 bf16", ranks=2, off=0.02)
    assert reported(PLAN_BF16, *sound)[0] == 0
    exact = sound[0].series(name)[1]
    for by, code in (
        (1.003, 0),
        (1.006, 1),
    ):  # of single, whose numbers are exact here, half again is nothing: rounding alone is allowed
        assert reported(PLAN_BF16, sound[0], made("ddp x2 bf16", ranks=2, off=0.02, **{name: by * exact}))[0] == code
    wrong = made("single x1 bf16", off=0.02, **{name: 0.6}), made("ddp x2 bf16", ranks=2, off=0.02, **{name: 0.6})
    assert "parity: FAILED for ddp x2 bf16" in reported(PLAN_BF16, sound[0], wrong[1])[1]
    assert "parity: FAILED for single x1 bf16" in reported(PLAN_BF16, wrong[0], sound[1])[1]


def test_distances_are_relative_to_the_reference() -> None:
    assert largest_relative([1.0, 2.0], [1.0, 2.2]) == pytest.approx(0.1)
    assert largest_relative([1.0], [1.0, 1.0]) == float("inf")
    one, two = {"gradient.w": np.array([3.0, 4.0], "f4")}, {"gradient.w": np.array([3.0, 4.5], "f4")}
    assert relative_distance(one, two, "gradient.") == pytest.approx(0.1)


def parity(recipe: str, *arguments: str) -> str:
    """What the real command prints; it must find no difference."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "parity", f"recipes/{recipe}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity: every variant takes the same steps" in done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        ([], ["ddp x2", "fsdp x2", "zero1 x2", "zero2 x2", "zero3 x2"]),
        pytest.param(
            ["--processes", "1,2,3"],
            [f"{name} x{ranks}" for name in ("ddp", "fsdp", "zero1", "zero2", "zero3") for ranks in (2, 3)],
            marks=pytest.mark.all,
        ),
    ],
)
def test_every_backend_takes_the_same_steps(arguments: list[str], labels: list[str], tmp_path: Path) -> None:
    tiny = [f"model.source={tiny_bert(tmp_path / 'bert')}", f"data.source={tiny_sentences(tmp_path / 'x.csv')}"]
    screen = parity("lora_sst2", *arguments, *tiny, "train.global_batch_size=24")
    assert [label for label in labels if label not in screen] == []


PAIRS = ("model.task=mlm_pairs", "train.metric=loss")
SOP = ("data.objective=mlm_sop", *PAIRS)
RECIPES: list[tuple[str, str, tuple[str, ...]]] = [
    ("pretrain_clm", "zero2", ()),
    ("pretrain_mlm", "fsdp", ("data.objective=mlm_nsp", *PAIRS)),
    ("pretrain_t5", "fsdp", ()),
    ("pretrain_bart", "zero2", ()),
    ("pretrain_xlnet", "ddp", ()),
    ("qa", "fsdp", ()),
    ("ner", "zero2", ()),
    ("summarize", "fsdp", ()),
    ("sft_smollm2", "zero2", ()),
]
"""Recipe, the backend that the slow tests launch it on beside `single`, settings."""
MORE_RECIPES = [
    *(("pretrain_mlm", words) for words in ((), SOP)),
    *((name, ()) for name in ("head_sst2", "full_sst2", "sft_full", "qlora_instruct")),
]


def tiny_source(recipe: str, folder: Path) -> list[str]:
    """A tiny model for the recipes whose own is another recipe's, or large."""
    if recipe == "summarize":
        return [f"model.source={tiny_writer(folder / 'model')}"]
    if recipe in ("sft_smollm2", "sft_full", "qlora_instruct"):
        return [
            f"model.source={tiny_chat_model(folder / 'model', tokenizer())}",
            f"data.source={chats(folder, count=40)}",
        ]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "backend", "settings"), RECIPES)
def test_recipes_take_the_same_steps_on_two_processes(
    recipe: str, backend: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    screen = parity(recipe, "--backends", backend, "--processes", "2", *settings, *tiny_source(recipe, tmp_path))
    assert f"{backend} x2" in screen


@pytest.mark.all
@pytest.mark.parametrize(("recipe", "settings"), [*((name, words) for name, _, words in RECIPES), *MORE_RECIPES])
def test_recipes_take_the_same_steps_on_ddp_fsdp_and_zero2(
    recipe: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    backends = ("--backends", "ddp,fsdp,zero2", "--processes", "2")
    screen = parity(recipe, *backends, *settings, *tiny_source(recipe, tmp_path))
    assert [name for name in ("ddp x2", "fsdp x2", "zero2 x2") if name not in screen] == []
