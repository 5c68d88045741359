"""The loop on real ranks: when it stops, what it keeps, what it does about a loss that is not finite, and who writes."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend import build_accelerator
from trainer.config import ClassificationData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.errors import SamestepError
from trainer.evaluate import evaluate_logits
from trainer.loop import Trainer
from trainer.loss import classification_loss_sum
from trainer.model.load import build_model
from trainer.stop import SIGNALS, STOP_FILE
from trainer.task import build_task, targets

TRAIN_LINE = {"step", "epoch", "train/loss", "train/accuracy", "train/lr", "train/grad_norm", "samples_per_s"}
MEASURES = {"loss", "accuracy", "precision", "recall", "f1", "count"}
BATCH, STEPS_PER_EPOCH = 16, 7  # 112 of the 160 sentences are trained on


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


def make_config(root: Path, run_dir: Path, *, method: str = "lora", **train: Any) -> RunConfig:
    """Without dropout, so that numbers can be compared; one line of metrics per step."""
    length = {} if "num_epochs" in train else {"max_steps": 6}
    return RunConfig(
        name="loop",
        run_dir=run_dir,
        model=ModelConfig(source=str(root / "model"), dropout=0.0, attention_dropout=0.0, head_dropout=0.0),
        method={"name": method},  # type: ignore[arg-type]
        data=ClassificationData(source=str(root / "data.csv")),
        optim=OptimConfig(peak_lr=1e-2),
        train=TrainConfig(**({"global_batch_size": BATCH, "log_every": 1} | length | train)),
    )


Change = Callable[[Trainer], None]


def train(runs: list[tuple[RunConfig, Change | None]]) -> list[dict[str, Any]]:
    """One training after the other in one process group; runs on every rank. What this rank saw of each."""
    accelerator = build_accelerator(runs[0][0])
    handlers = [signal.getsignal(number) for number in SIGNALS]
    seen = []
    for config, change in runs:
        task = build_task(config, accelerator)
        model = build_model(config, task.label_names, accelerator)
        accelerator.free_memory()
        trainer = Trainer(config, accelerator, model, task)
        written = writes_below(config.folder)
        targets.classification_loss_sum = classification_loss_sum
        if change is not None:
            change(trainer)
        error = None
        try:
            trainer.fit()
        except SamestepError as raised:
            error = f"{type(raised).__name__}: {raised}"
        facts = {name: getattr(trainer.progress, name) for name in ("step", "best_step", "num_skipped")}
        facts |= {"error": error, "written": list(written), "validation": task.data.validation}
        facts |= {"restored": [signal.getsignal(number) for number in SIGNALS] == handlers}
        seen.append(facts | getattr(trainer, "noted", {}))
    return seen


def writes_below(folder: Path) -> list[str]:
    """A list that grows with what this process makes, opens for writing, renames or removes in `folder`."""
    written: list[str] = []
    changing = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate", "os.symlink"}

    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in changing) and str(arguments[0]).startswith(str(folder)):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(notice)
    return written


def fit_one(config: RunConfig, change: Change | None = None, *, backend: str = "ddp", ranks: int = 2) -> list[Any]:
    return [seen[0] for seen in run_ranks(train, backend, ranks, args=([(config, change)],))]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def lines_with(key: str, run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if key in line]


def assert_reported(run: Path) -> None:
    """The run ended as a whole run ends."""
    for name in ("config.yaml", "log.txt", "curves.png", "confusion.png", "summary.md", "model/samestep.json"):
        assert (run / name).stat().st_size > 0, name
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == set()
    assert read_metrics(run)[-1]["test/count"] == 24


# Changes of a live trainer, on every rank


def after_step(number: int, act: Callable[[Trainer], None], trainer: Trainer) -> None:
    """Call `act` once, when this rank has taken step `number`."""
    take_step = trainer.train_step

    def step_and_act() -> None:
        take_step()
        if trainer.progress.step == number:
            act(trainer)

    trainer.train_step = step_and_act  # type: ignore[method-assign]


def note_mode(trainer: Trainer) -> None:
    """Note for each step whether dropout would act in it."""
    loss_sum = trainer.loss_sum
    trainer.noted = {"modes": []}  # type: ignore[attr-defined]

    def and_note(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        trainer.noted["modes"].append(all(module.training for module in trainer.engine.model.modules()))  # type: ignore[attr-defined]
        return loss_sum(batch)

    trainer.loss_sum = and_note  # type: ignore[method-assign]


def signal_last_rank(number: signal.Signals, trainer: Trainer) -> None:
    if trainer.rank == trainer.world_size - 1:
        os.kill(os.getpid(), number)


def touch_stop_file(trainer: Trainer) -> None:
    if trainer.rank == 0:
        (trainer.config.folder / STOP_FILE).touch()


def spoil(factor: float, offset: float, steps: range, trainer: Trainer) -> None:
    """Make the loss of these 1-based steps `factor * loss + offset` on the last rank; note the weights after each step."""
    take_step = trainer.train_step
    trainer.noted = {"weights": []}  # type: ignore[attr-defined]

    def spoilt(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hit = trainer.rank == trainer.world_size - 1 and trainer.progress.step + 1 in steps
        loss = classification_loss_sum(logits, labels)
        return loss * factor + offset if hit else loss

    def step_and_note() -> None:
        take_step()
        weights = [tensor.cpu().numpy().ravel().copy() for _, tensor in trainer.engine.weights(trainable_only=True)]
        trainer.noted["weights"].append(np.concatenate(weights))  # type: ignore[attr-defined]

    targets.classification_loss_sum = spoilt  # in this process until the next training
    trainer.train_step = step_and_note  # type: ignore[method-assign]


def ruin_after(number: int, trainer: Trainer) -> None:
    """A learning rate that ruins the weights after 1-based step `number`; note what the engine predicted at the best step."""
    trainer.lr_of_step = lambda step: 1e-2 if step < number else 1.0  # type: ignore[method-assign]
    evaluate_and_keep_best = trainer.evaluate_and_keep_best
    trainer.noted = {}  # type: ignore[attr-defined]

    def and_note() -> None:
        evaluate_and_keep_best()
        if trainer.progress.best_step == trainer.progress.step:
            engine, split = trainer.engine, trainer.task.data.validation
            engine.model.eval()
            trainer.noted["logits"] = evaluate_logits(engine.forward, trainer.task.data, split, engine, batch_size=5)  # type: ignore[attr-defined]
            engine.model.train()

    trainer.evaluate_and_keep_best = and_note  # type: ignore[method-assign]


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


# A request to stop


def test_a_request_to_stop_ends_all_ranks_at_one_step_with_a_checkpoint(root: Path, tmp_path: Path) -> None:
    asked: dict[str, Callable[[Trainer], None]] = {
        "file": touch_stop_file,
        "usr1": partial(signal_last_rank, signal.SIGUSR1),
        "term": partial(signal_last_rank, signal.SIGTERM),
    }
    runs = [
        (make_config(root, tmp_path / name, max_steps=50, eval_every=50), partial(after_step, 3, act))
        for name, act in asked.items()
    ]
    for number, by_rank in enumerate(zip(*run_ranks(train, "ddp", args=(runs,)), strict=True)):
        run = runs[number][0].folder
        assert [facts["step"] for facts in by_rank] == [4, 4], (
            run.name
        )  # the flags are summed with the next step's targets
        assert all(facts["restored"] and facts["error"] is None for facts in by_rank)
        assert [
            line["step"] for line in lines_with("eval/loss", run)
        ] == []  # the machine may be about to be taken away
        assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000004"]
        assert json.loads((run / "outcome.json").read_text()) == {"outcome": "stopped", "step": 4}
        assert "stopped on request after step 4" in (run / "log.txt").read_text(encoding="utf-8")
        assert not (run / STOP_FILE).exists()


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_sharded_backends_too(backend: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", max_steps=50, eval_every=2)
    change = partial(after_step, 2, partial(signal_last_rank, signal.SIGUSR1))
    assert [facts["step"] for facts in fit_one(config, change, backend=backend)] == [3, 3]
    assert "step-00000003" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


# A loss that is not finite

SPOILT = {"nan": (float("nan"), 0.0), "inf": (float("inf"), 0.0)}


def test_a_nonfinite_loss_on_one_rank_raises_on_all_ranks_with_the_step(root: Path, tmp_path: Path) -> None:
    runs = [
        (make_config(root, tmp_path / name), partial(spoil, factor, offset, range(3, 4)))
        for name, (factor, offset) in SPOILT.items()
    ]
    for seen in run_ranks(train, "ddp", args=(runs,)):
        for facts in seen:
            assert facts["error"].startswith("DivergedError: step 3: ")
            assert "train.on_nonfinite=skip" in facts["error"]
            assert facts["restored"]
    for config, _ in runs:
        assert [line["step"] for line in lines_with("train/loss", config.folder)] == [1, 2]


@pytest.mark.parametrize("backend", ["ddp", "fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_skip_leaves_the_step_out_on_all_ranks(backend: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="skip")
    for facts in fit_one(config, partial(spoil, *SPOILT["nan"], range(3, 4)), backend=backend):
        assert (facts["error"], facts["num_skipped"], facts["step"]) == (None, 1, 6)
        moved = [not np.array_equal(one, two) for one, two in zip(facts["weights"], facts["weights"][1:], strict=False)]
        assert moved == [True, False, True, True, False]  # of steps 2 to 6; the last one's rate is 0
        assert np.isfinite(facts["weights"][-1]).all()
    lines = lines_with("train/loss", tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]  # no loss of 0.0 for a step that has none
    assert "| skipped steps | 1 |" in (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")


def test_more_skipped_steps_than_allowed_raise_on_all_ranks(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="skip", max_skipped_steps=2)
    for facts in fit_one(config, partial(spoil, *SPOILT["nan"], range(2, 100))):
        assert facts["error"].startswith("DivergedError: step 4: ")
        assert "train.max_skipped_steps (2)" in facts["error"]


def test_an_infinite_loss_with_a_finite_gradient_is_not_finite_either(root: Path, tmp_path: Path) -> None:
    for facts in fit_one(make_config(root, tmp_path / "run"), partial(spoil, 1.0, float("inf"), range(3, 4))):
        assert (facts["error"] or "").startswith("DivergedError: step 3: ")


def test_the_logged_loss_leaves_skipped_steps_out(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="skip", log_every=6)
    fit_one(config, partial(spoil, *SPOILT["nan"], range(3, 4)))
    assert [line["train/loss"] is not None for line in lines_with("train/loss", tmp_path / "run")] == [True]


# A mistake that rank 0 alone can see


def test_a_run_directory_that_cannot_be_used_raises_on_all_ranks(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    main, other = fit_one(make_config(root, tmp_path / "run"))
    assert "is a file" in main["error"]
    assert other["error"] is not None
