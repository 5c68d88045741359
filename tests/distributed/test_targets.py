"""Several labels, numbers and weighted classes with a pooled head: the same steps on every backend, resume, export, prediction."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.predict import predict_command
from tests.distributed.resume_runs import metrics_of, same_weights, start
from tests.tiny import tiny_bert, tiny_sentences, tiny_targets
from trainer.checkpoint.export import export_checkpoint, find_checkpoint
from trainer.config import ClassificationData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.model.export import load_exported

STEPS = 6
TARGETS: dict[str, dict[str, Any]] = {
    "single": {"label": "label", "class_weights": (1.0, 3.0), "label_smoothing": 0.1},
    "multi": {"label": "labels", "target": "multi", "class_weights": "balanced"},
    "regression": {"label": "score", "target": "regression"},
}
PICTURES = {"single": "confusion.png", "multi": "labels.png", "regression": "numbers.png"}
TEXTS = ["the film is good", "awful and dull music"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "single.csv", rows=96)
    for target in ("multi", "regression"):
        tiny_targets(folder / f"{target}.jsonl")
    return folder


def make_config(root: Path, run: Path, method: str, target: str, **train: Any) -> RunConfig:
    """Without dropout, which differs between numbers of ranks; one micro-batch of each step is empty on rank 1 of 2."""
    settings = {"max_steps": STEPS, "save_every": 3, "eval_every": 3, "log_every": 3}
    suffix = "csv" if target == "single" else "jsonl"
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "head_dropout": 0.0}
    return RunConfig(
        name="targets",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), pooling="mean", head_layers=2, **quiet),
        method={"name": method},  # type: ignore[arg-type]
        data=ClassificationData(source=str(root / f"{target}.{suffix}"), **TARGETS[target]),
        optim=OptimConfig(peak_lr=5e-3),
        train=TrainConfig(global_batch_size=11, micro_batch_size=5, **(settings | train)),
    )


_single: dict[tuple[str, str], dict[str, Any]] = {}


def of_single(root: Path, method: str, target: str) -> dict[str, Any]:
    """What one process saw, trained once for all tests."""
    key = (method, target)
    if key not in _single:
        config = make_config(root, root / f"{method}-{target}", method, target)
        seen = start(config, "single", 1)
        assert seen is not None and seen[0]["error"] is None, seen
        _single[key] = {**seen[0], "run": config.folder}
    return _single[key]


CELLS = (("full", "multi", "fsdp"), ("lora", "regression", "ddp"))
SLOW = (
    ("full", "multi", "ddp"), ("lora", "regression", "fsdp"), ("full", "single", "zero3"), ("adapter", "multi", "fsdp"),
    ("full", "regression", "zero2"),
)  # fmt: skip
"""Method, target, backend. The last has an odd number of parameters."""


@pytest.mark.parametrize(
    ("method", "target", "backend"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)]
)
def test_steps_are_the_same_on_a_backend_and_resume_and_export_are_exact(
    method: str, target: str, backend: str, root: Path, tmp_path: Path
) -> None:
    expected = of_single(root, method, target)
    whole = start(make_config(root, tmp_path / "run", method, target), backend, 2)
    assert whole is not None
    assert [facts["error"] for facts in whole] == [None, None]
    summed = [sum(facts["losses"][step] for facts in whole) for step in range(STEPS)]
    assert summed == pytest.approx(list(expected["losses"].values()), rel=1e-5)
    assert max(summed) - min(summed) > 1e-3
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(expected["run"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)

    again = make_config(root, tmp_path / "again", method, target)
    stopped = start(again, backend, 2, fault="step@1:3:usr1")
    assert stopped is not None and {facts["step"] for facts in stopped} == {3}
    resumed = start(again, backend, 2)
    assert resumed is not None
    assert all(same_weights(one, other) for one, other in zip(resumed, whole, strict=True))
    check_exports(again.folder, tmp_path / "exported", whole[0]["weights"])


def check_exports(run: Path, target: Path, trained: dict[str, np.ndarray]) -> None:
    """The run's best, and its last checkpoint: both open, and the latter is what was trained."""
    export_checkpoint(find_checkpoint(run), target)
    for folder in (run / "model", target):
        model, tokenizer, info = load_exported(folder)
        assert (info["pooling"], info["head_layers"]) == ("mean", 2)
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        assert logits.shape == (2, len(info["label_names"])) and bool(torch.isfinite(logits).all())
    loaded = dict(load_exported(target)[0].named_parameters())
    names = [name for name in trained if name in loaded]
    assert len(names) == len(trained) and any("classifier" in name for name in names)
    assert all(np.array_equal(loaded[name].detach().numpy(), trained[name]) for name in names)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_reports_what_fits_its_target(target: str, root: Path) -> None:
    run: Path = of_single(root, "full", target)["run"]
    assert [name for name in PICTURES.values() if (run / name).is_file()] == [PICTURES[target]]
    assert (run / "curves.png").stat().st_size > 10_000
    names = {name for line in metrics_of(run) for name in line}
    wanted = {
        "single": {"train/accuracy", "eval/loss", "test/accuracy", "test/f1", "test/precision", "test/recall"},
        "multi": {"train/accuracy", "eval/f1", "test/accuracy", "test/f1", "test/micro_f1"},
        "regression": {"train/mae", "eval/loss", "eval/mae", "test/pearson", "test/spearman"},
    }[target]
    assert wanted <= names
    best = {"single": "accuracy", "multi": "f1", "regression": "loss"}[target]
    assert f"(validation {best} " in (run / "summary.md").read_text()


def predict(run: Path, *, as_json: bool) -> list[str]:
    with redirect_stdout(io.StringIO()) as screen, redirect_stderr(io.StringIO()):
        assert predict_command(run, TEXTS, as_json=as_json) == 0
    return screen.getvalue().splitlines()


@pytest.mark.parametrize(("method", "target"), [("full", "multi"), ("lora", "regression")])
def test_prediction_gives_all_labels_above_a_half_or_the_value(method: str, target: str, root: Path) -> None:
    run: Path = of_single(root, method, target)["run"]
    model, tokenizer, info = load_exported(run / "model")
    with torch.no_grad():
        outputs = torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in TEXTS])
    lines, facts = predict(run, as_json=False), [json.loads(line) for line in predict(run, as_json=True)]
    for text, line, fact, row in zip(TEXTS, lines, facts, outputs, strict=True):
        assert fact["text"] == text and line.endswith(f"  {text}") and fact["is_cut"] is False
        if target == "regression":
            assert fact["value"] == pytest.approx(float(row[0]), rel=1e-5)
            assert float(line.split()[0]) == pytest.approx(float(row[0]), abs=1e-4)
            continue
        probabilities = dict(zip(info["label_names"], row.sigmoid().tolist(), strict=True))
        assert fact["probabilities"] == pytest.approx(probabilities, rel=1e-5)
        above = sorted((name for name, value in probabilities.items() if value > 0.5), key=probabilities.__getitem__)
        assert fact["labels"] == above[::-1]
        assert line.startswith(", ".join(f"{name} {probabilities[name]:.4f}" for name in above[::-1]) or "-  ")


def test_a_longer_run_learns_all_labels_and_the_number(root: Path) -> None:
    for target, metric, least in (("multi", "f1", 0.85), ("regression", "pearson", 0.9)):
        settings = {"max_steps": 100, "eval_every": 100, "save_every": 100, "metric": metric}
        short = make_config(root, root / f"long-{target}", "full", target, **settings)
        config = short.model_copy(update={"optim": OptimConfig(peak_lr=1e-2)})
        seen = start(config, "single", 1)
        assert seen is not None and seen[0]["error"] is None
        assert metrics_of(config.folder)[-1][f"test/{metric}"] > least
