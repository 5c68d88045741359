"""Token classification end to end: learns, counts each word once on any number of ranks, exports, predicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForTokenClassification

from launch.cli import main
from tests.distributed.resume_runs import metrics_of, start
from tests.tiny import BAD, FILLERS, GOOD, tiny_bert
from trainer.config import ModelConfig, OptimConfig, RunConfig, TagData, TrainConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good words are entities of one type, two bad ones side by side of another."""
    folder = tmp_path_factory.mktemp("tags")
    tiny_bert(folder / "model")
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(160):
        words = [(str(word), "O") for word in rng.choice(FILLERS, int(rng.integers(3, 12)))]
        words.insert(int(rng.integers(len(words))), (str(rng.choice(GOOD)), "B-GOOD"))
        words += [(str(rng.choice(BAD)), "B-BAD"), (str(rng.choice(BAD)), "I-BAD")]
        lines.append("".join(f"{word} {tag}\n" for word, tag in words))
    (folder / "data.conll").write_text("\n".join(lines))
    return folder


def make_config(root: Path, run: Path, **changed: Any) -> RunConfig:
    return RunConfig(
        name="tags",
        run_dir=run,
        model=ModelConfig(
            source=str(root / "model"),
            task="token_classification",
            dropout=0.0,
            attention_dropout=0.0,
            head_dropout=0.0,
        ),
        data=TagData(source=str(root / "data.conll"), max_length=16),
        optim=OptimConfig(peak_lr=1e-2),
        train=TrainConfig(
            max_steps=60, global_batch_size=16, eval_every=30, eval_batch_size=8, log_every=10, metric="f1"
        ),
        **changed,
    )


@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_it_learns_and_the_export_finds_entities(
    method: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(root, tmp_path / "run", method={"name": method})
    seen = start(config, "single", 1)
    assert seen is not None
    assert seen[0]["error"] is None
    last = metrics_of(config.folder)[-1]
    assert last["test/f1"] > (0.5 if method != "head" else 0.1)
    assert "GOOD" in (config.folder / "entities.txt").read_text()
    if method != "lora":
        model = AutoModelForTokenClassification.from_pretrained(config.folder / "model")
        assert model.config.id2label == {0: "O", 1: "B-BAD", 2: "I-BAD", 3: "B-GOOD", 4: "I-GOOD"}
    if method == "head":
        return
    text = "the film is superb with music dull poor, a superb story"
    with pytest.raises(SystemExit):
        main(["predict", str(config.folder), text, "--json"])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["text"] == text
    assert all(text[one["start"] : one["end"]] == one["text"] for one in answer["entities"])
    assert ("GOOD", "superb") in [(one["entity"], one["text"]) for one in answer["entities"]]


def test_two_ranks_evaluate_and_learn_as_one_process(root: Path, tmp_path: Path) -> None:
    short = {
        "max_steps": 6,
        "global_batch_size": 10,
        "eval_every": 3,
        "eval_batch_size": 4,
        "log_every": 1,
        "metric": "f1",
    }
    runs = []
    for name, backend, ranks in (("one", "single", 1), ("two", "fsdp", 2), ("three", "ddp", 3)):
        config = make_config(root, tmp_path / name).model_copy(update={"train": TrainConfig(**short)})
        seen = start(config, backend, ranks)
        assert seen is not None
        assert seen[0]["error"] is None
        runs.append(metrics_of(config.folder))
    for other in runs[1:]:
        for line, expected in zip(other, runs[0], strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-7)
