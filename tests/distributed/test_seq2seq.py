"""Models with an encoder and a decoder on real ranks: the loss of one process, the same answers, an export that holds what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.resume_runs import same_weights, start
from tests.tiny import tiny_bart, tiny_pairs, tiny_t5
from trainer.checkpoint.export import export_checkpoint, find_checkpoint
from trainer.config import ModelConfig, OptimConfig, PairData, RunConfig, TrainConfig
from trainer.model.export import load_exported

STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of 1 to 6 words, so that ranks hold unequal numbers of them; 61 texts, of which 13 are held out."""
    folder = tmp_path_factory.mktemp("seq2seq")
    tiny_t5(folder / "t5")
    tiny_bart(folder / "bart")
    tiny_pairs(folder / "pairs.jsonl", rows=61)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    unlike = [row | {"target": " ".join(row["text"].split()[:6])} for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, unlike)) + "\n")
    return folder


def run_config(root: Path, run: Path, source: str, method: str, **train: Any) -> RunConfig:
    settings = {"max_steps": STEPS, "global_batch_size": 7, "metric": "loss", "eval_every": STEPS, "save_every": 2}
    data = PairData(
        source=str(root / "pairs.jsonl"), max_length=20, max_target_length=8, new_tokens=5, validation_fraction=0.2
    )
    return RunConfig(
        name="seq2seq",
        run_dir=run,
        model=ModelConfig(source=str(root / source), task="seq2seq"),
        method={"name": method},  # type: ignore[arg-type]
        data=data,
        optim=OptimConfig(peak_lr=5e-3),
        train=TrainConfig(**(settings | train)),
    )


def last_line(run: Path) -> dict[str, float]:
    found = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in found.items() if name.startswith("eval/")}


_single: dict[tuple[str, str], tuple[list[float], dict[str, float]]] = {}


def of_single(root: Path, source: str, method: str) -> tuple[list[float], dict[str, float]]:
    """Losses and last metrics of one process, trained once for all backends."""
    if (source, method) not in _single:
        run = root / f"single-{source}-{method}"
        seen = start(run_config(root, run, source, method), "single", 1)
        assert seen is not None
        assert seen[0]["error"] is None
        _single[source, method] = list(seen[0]["losses"].values()), last_line(run)
    return _single[source, method]


@pytest.mark.parametrize(
    ("backend", "source", "method", "micro"),
    [
        ("ddp", "t5", "full", None),
        ("fsdp", "t5", "full", 2),
        ("fsdp", "bart", "full", None),
        ("ddp", "bart", "lora", 2),
        pytest.param("fsdp", "t5", "lora", None, marks=pytest.mark.slow),
        pytest.param("zero3", "t5", "full", None, marks=pytest.mark.slow),
        pytest.param("zero2", "t5", "lora", None, marks=pytest.mark.slow),
        pytest.param("zero3", "bart", "lora", None, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_take_the_steps_of_one(
    backend: str, source: str, method: str, micro: int | None, root: Path, tmp_path: Path
) -> None:
    losses, metrics = of_single(root, source, method)
    facts = start(run_config(root, tmp_path / "run", source, method, micro_batch_size=micro), backend, 2)
    assert facts is not None
    assert [each["error"] for each in facts] == [None, None]
    assert [sum(each["losses"][step] for each in facts) for step in range(STEPS)] == pytest.approx(losses, rel=1e-5)
    assert max(losses) - min(losses) > 1e-3
    assert last_line(tmp_path / "run") == pytest.approx(metrics, rel=1e-5)
    assert metrics["eval/generated"] == 12
    check_exports(tmp_path / "run", tmp_path / "exported", facts[0]["weights"])


def check_exports(run: Path, target: Path, trained: dict[str, np.ndarray]) -> None:
    """The run's own export and one from its last checkpoint open, hold what was trained, and say the same.

    BART's final_logits_bias, zeros that transformers makes again, is in the first one only.
    """
    export_checkpoint(find_checkpoint(run), target)
    models = [load_exported(folder)[0] for folder in (run / "model", target)]
    for model in models:
        weights = dict(model.named_parameters())
        assert trained.keys() <= weights.keys()
        assert all(np.array_equal(weights[name].detach().numpy(), array) for name, array in trained.items())
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        one, other = (model(input_ids=ids, decoder_input_ids=ids).logits for model in models)
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_on_two_ranks_resumes_to_the_same_weights(backend: str, root: Path, tmp_path: Path) -> None:
    whole = start(run_config(root, tmp_path / "whole", "t5", "full"), backend, 2)
    stopped = start(run_config(root, tmp_path / "again", "t5", "full"), backend, 2, fault="step@1:3:usr1")
    resumed = start(run_config(root, tmp_path / "again", "t5", "full"), backend, 2)
    assert whole is not None
    assert stopped is not None
    assert resumed is not None
    for facts, expected in zip(resumed, whole, strict=True):
        assert facts["error"] is None
        assert sorted(facts["losses"]) == [3]
        assert same_weights(facts, expected)


@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_a_buffer_of_the_models_files_survives_resume_and_export(backend: str, root: Path, tmp_path: Path) -> None:
    """BART's bias of the logits, which Marian's translators need; it is no parameter."""
    from transformers import BartForConditionalGeneration

    base = tmp_path / "bart"
    shutil.copytree(root / "bart", base)
    model = BartForConditionalGeneration.from_pretrained(base)
    bias = torch.randn_like(model.final_logits_bias)
    model.final_logits_bias = torch.nn.Buffer(bias)
    model.save_pretrained(base)
    config = run_config(root, tmp_path / "run", str(base), "full")
    assert start(config, backend, 2, fault="step@1:3:usr1") is not None
    seen = start(config, backend, 2)
    assert seen is not None
    assert [facts["error"] for facts in seen] == [None, None]
    export_checkpoint(find_checkpoint(config.folder), tmp_path / "out")
    for folder in (config.folder / "model", tmp_path / "out"):
        found, report = BartForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert torch.equal(found.final_logits_bias, bias), folder
        assert not report["missing_keys"]
