"""The loop on real ranks: how long it trains, what it logs and keeps, and who writes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.loop_runs import (
    STEPS_PER_EPOCH,
    assert_reported,
    fit_one,
    lines_with,
    make_config,
    note_mode,
    read_metrics,
    ruin_after,
    train,
)
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import OptimConfig

TRAIN_LINE = {"step", "epoch", "train/loss", "train/accuracy", "train/lr", "train/grad_norm", "samples_per_s"}
MEASURES = {"loss", "accuracy", "precision", "recall", "f1", "count"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle's tiny matrices on more threads than there are free cores take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


# How long


@pytest.fixture(scope="module")
def runs_of_1_2_3_ranks(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[Any]]]:
    """The same training with 1, 2 and 3 processes: the run directory, and what each rank saw."""
    found = {}
    for ranks in (1, 2, 3):
        run = tmp_path_factory.mktemp("ranks") / "run"
        config = make_config(root, run, max_steps=STEPS_PER_EPOCH + 2, eval_every=4)
        found[ranks] = (run, fit_one(config, note_mode, backend="single" if ranks == 1 else "ddp", ranks=ranks))
    return found


def test_max_steps_runs_exactly_that_many(runs_of_1_2_3_ranks: dict[int, tuple[Path, list[Any]]]) -> None:
    for run, seen in runs_of_1_2_3_ranks.values():
        assert {facts["step"] for facts in seen} == {STEPS_PER_EPOCH + 2}
        assert [line["step"] for line in lines_with("train/loss", run)] == list(range(1, STEPS_PER_EPOCH + 3))
        assert [line["step"] for line in lines_with("eval/loss", run)] == [4, 8, 9]  # the last step always


def test_dropout_acts_in_every_training_step(runs_of_1_2_3_ranks: dict[int, tuple[Path, list[Any]]]) -> None:
    for _, seen in runs_of_1_2_3_ranks.values():
        assert [facts["modes"] for facts in seen] == [[True] * (STEPS_PER_EPOCH + 2)] * len(seen)


def test_metrics_have_the_documented_keys(runs_of_1_2_3_ranks: dict[int, tuple[Path, list[Any]]]) -> None:
    for run, _ in runs_of_1_2_3_ranks.values():
        *lines, last = read_metrics(run)
        kinds = {frozenset(line) for line in lines}
        assert kinds == {frozenset(TRAIN_LINE), frozenset({"step", *(f"eval/{name}" for name in MEASURES)})}
        assert set(last) == {"step", "best_step", *(f"test/{name}" for name in MEASURES)}
        assert_reported(run)


def test_the_curve_does_not_depend_on_the_number_of_processes(
    runs_of_1_2_3_ranks: dict[int, tuple[Path, list[Any]]],
) -> None:
    curves = {ranks: read_metrics(run) for ranks, (run, _) in runs_of_1_2_3_ranks.items()}
    rates = {ranks: [line["train/lr"] for line in lines if "train/lr" in line] for ranks, lines in curves.items()}
    assert rates[1] == rates[2] == rates[3]  # to the last bit
    assert len(set(rates[1])) == STEPS_PER_EPOCH + 2
    for ranks in (2, 3):
        for line, expected in zip(curves[ranks], curves[1], strict=True):
            timed = {"samples_per_s"}
            assert {k: v for k, v in line.items() if k not in timed} == pytest.approx(
                {k: v for k, v in expected.items() if k not in timed}, rel=1e-3
            )


def test_only_rank_0_writes(runs_of_1_2_3_ranks: dict[int, tuple[Path, list[Any]]]) -> None:
    for _, (main, *others) in runs_of_1_2_3_ranks.values():
        assert len(main["written"]) > 10
        own = [[line for line in facts["written"] if "/checkpoints/.tmp-" not in line] for facts in others]
        assert own == [[]] * len(others)  # but for its shards of a checkpoint


def test_epochs_may_be_parts_and_patience_ends_a_run_that_does_not_improve(root: Path, tmp_path: Path) -> None:
    stuck = make_config(root, tmp_path / "stuck", max_steps=40, eval_every=2, patience=2)
    stuck = stuck.model_copy(update={"optim": OptimConfig(peak_lr=1e-12)})
    part = make_config(root, tmp_path / "part", num_epochs=1.2)
    for stuck_seen, part_seen in run_ranks(train, "ddp", args=([(stuck, None), (part, None)],)):
        assert (stuck_seen["step"], stuck_seen["best_step"]) == (6, 2)  # the first is the best, two more are no better
        assert part_seen["step"] == 9  # 1.2 x 7, rounded up
    assert [line["step"] for line in lines_with("eval/loss", tmp_path / "stuck")] == [2, 4, 6]
    assert [line["step"] for line in lines_with("eval/loss", tmp_path / "part")] == [
        7,
        9,
    ]  # once per epoch, and the last
    assert read_metrics(tmp_path / "stuck")[-1]["best_step"] == 2
    assert_reported(tmp_path / "stuck")


# What is kept


def opened_by_plain_libraries(run: Path, base: Path, method: str) -> torch.nn.Module:
    """As a person without samestep opens it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if method == "lora":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        return PeftModel.from_pretrained(plain, run / "model").eval()
    return AutoModelForSequenceClassification.from_pretrained(run / "model").eval()


def logits_one_at_a_time(model: torch.nn.Module, split: Any) -> np.ndarray:
    samples = [split.tokens[start:end] for start, end in zip(split.offsets, split.offsets[1:], strict=False)]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor(sample[None].astype(np.int64))).logits[0] for sample in samples]
    return torch.stack(logits).double().numpy()


COMBINATIONS = [
    *[("ddp", "lora"), ("fsdp", "lora"), ("fsdp", "head"), ("zero3", "full")],
    *[
        pytest.param(backend, method, marks=pytest.mark.slow)
        for backend, method in [
            *[("ddp", "full"), ("ddp", "head"), ("fsdp", "full"), ("zero3", "head"), ("zero3", "lora"), ("single", "full")],
            *[("zero1", "lora"), ("zero1", "full"), ("zero1", "head"), ("zero2", "lora"), ("zero2", "full"), ("zero2", "head")],
        ]
    ],
]  # fmt: skip


@pytest.mark.parametrize(("backend", "method"), COMBINATIONS)
def test_plain_libraries_open_the_best_step_and_predict_what_the_engine_predicted(
    backend: str, method: str, root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = make_config(root, run, method=method, max_steps=6, eval_every=2, metric="loss")
    main, *_ = fit_one(config, partial(ruin_after, 4), backend=backend, ranks=1 if backend == "single" else 2)
    evaluations = {line["step"]: line for line in lines_with("eval/loss", run)}
    best = min(evaluations, key=lambda step: evaluations[step]["eval/loss"])
    assert main["best_step"] == best == read_metrics(run)[-1]["best_step"]
    assert best < 6
    assert evaluations[6]["eval/loss"] > 1.01 * evaluations[best]["eval/loss"]  # the last weights would be told apart
    logits = logits_one_at_a_time(opened_by_plain_libraries(run, root / "model", method), main["validation"])
    assert np.allclose(logits, main["logits"], rtol=0, atol=1e-5)
    labels = torch.from_numpy(main["validation"].labels)
    loss = float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), labels))
    assert loss == pytest.approx(evaluations[best]["eval/loss"], rel=1e-5)
    assert (logits.argmax(1) == labels.numpy()).mean() == pytest.approx(evaluations[best]["eval/accuracy"])


# A mistake that rank 0 alone can see


def test_a_run_directory_that_cannot_be_used_raises_on_all_ranks(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    main, other = fit_one(make_config(root, tmp_path / "run"))
    assert "is a file" in main["error"]
    assert other["error"] is not None
