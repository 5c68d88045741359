"""Pretraining data under any topology: real processes read the samples of one order, and a killed run goes on with the very next one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed.resume_runs import metrics_of, start
from tests.rank_pool import BACKENDS, run_ranks
from tests.tiny import tiny_llama, tiny_tokens
from trainer.config import ModelConfig, OptimConfig, ProbeConfig, RunConfig, StreamData, TrainConfig
from trainer.data.stream.mix import Stage
from trainer.data.stream.reader import Stream, StreamSettings

NUM_STEPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    tiny_llama(folder / "model")
    for number, documents in enumerate((120, 60, 20)):
        tiny_tokens(folder / f"tokens-{number}", documents, seed=number)
    return folder


def make_config(root: Path, run: Path, **changed: Any) -> RunConfig:
    """Two mixed sources, packed, every step logged, a checkpoint every second one."""
    data = {
        "sources": (str(root / "tokens-0"), str(root / "tokens-1")),
        "weights": (3, 1),
        "validation": str(root / "tokens-2"),
        "sequence_length": 48,
        "max_epochs": 4,
        "cache": root / "cache",
    }
    return RunConfig(
        name="stream",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), task="clm", init="random"),
        data=StreamData(**(data | changed)),
        optim=OptimConfig(peak_lr=1e-2),
        train=TrainConfig(
            max_steps=NUM_STEPS, global_batch_size=12, log_every=1, save_every=2, eval_every=5, metric="loss"
        ),
    )


_never_killed: dict[Path, tuple[Path, list[dict[str, Any]]]] = {}


def never_killed(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The uninterrupted run on one process: its folder and what it saw."""
    if root not in _never_killed:
        seen = start(make_config(root, root / "whole"), "single", 1)
        assert seen is not None
        assert seen[0]["error"] is None
        _never_killed[root] = (root / "whole", seen)
    return _never_killed[root]


def global_rows(seen: list[dict[str, Any]], step: int) -> list[list[int]]:
    """A step's rows, those of all ranks in their order."""
    return [row for facts in seen for row in facts["rows"][step]]


def assert_same_curve(run: Path, whole: Path) -> None:
    """Every logged number of training and validation within 1e-5."""
    one, two = metrics_of(run), metrics_of(whole)
    assert len(one) == len(two) > NUM_STEPS
    for line, expected in zip(one, two, strict=True):
        assert line.keys() == expected.keys()
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "single"])
def test_every_backend_reads_and_learns_the_same(backend: str, root: Path, tmp_path: Path) -> None:
    seen = start(make_config(root, tmp_path / "run"), backend, 2)
    whole, expected = never_killed(root)
    assert seen is not None
    assert [facts["error"] for facts in seen] == [None, None]
    for step in range(NUM_STEPS):
        assert global_rows(seen, step) == global_rows(expected, step)
    assert_same_curve(tmp_path / "run", whole)


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_killed_and_resumed_on_one_and_three_ranks(backend: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    assert start(config, backend, 2, fault="step@1:6") is None
    assert start(config, "single", 1, fault="step@0:6") is None
    seen = start(config, backend, 3)
    whole, expected = never_killed(root)
    assert seen is not None
    assert [facts["error"] for facts in seen] == [None] * 3
    steps = sorted(seen[0]["rows"])
    assert 0 < steps[0] < steps[-1] == NUM_STEPS - 1
    for step in steps:
        assert global_rows(seen, step) == global_rows(expected, step)
    assert_same_curve(config.folder, whole)


def test_the_run_leaves_a_model_samples_and_its_metrics(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole, seen = never_killed(root)
    model, tokenizer = (kind.from_pretrained(whole / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer) == 61
    assert tokenizer.decode([3, 10]) == "w3 w10"
    lines = metrics_of(whole)
    assert {"train/loss", "train/bits_per_byte", "train/padding", "train/lr"} <= lines[0].keys()
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_byte"} <= lines[-1].keys()
    assert lines[-2]["eval/loss"] < lines[0]["train/loss"] - 0.3  # it learned
    assert "[...]" in (whole / "samples.txt").read_text()
    for name, tensor in seen[0]["weights"].items():
        assert torch.equal(model.get_parameter(name).detach(), torch.from_numpy(tensor)), name


def read_steps(folders: list[Path], made: StreamSettings, state: dict[str, Any], plan: dict[str, Any]) -> Any:
    """What one rank reads from a state on: rows of each step by micro-batch; runs on every rank."""
    import os

    stream = Stream(
        folders, made, stages=[Stage(0, (3, 1, 1)), Stage(150, (1, 1, 4))], plan_folder=folders[0].parent / "plans"
    )
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    samples = stream.check_state(state) if state else 0
    steps = []
    for _ in range(plan["steps"]):
        parts = stream.micro_batches(samples, plan["batch"], rank, world_size, plan["micro"])
        steps.append([row for part in parts for row in stream.batch(part)["input_ids"].tolist()])
        samples += plan["batch"]
    return steps, stream.state(samples)


LINKS = st.lists(
    st.fixed_dictionaries(
        {"ranks": st.integers(1, 4), "steps": st.integers(1, 5), "micro": st.sampled_from([None, 1, 3])}
    ),
    min_size=2,
    max_size=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(links=LINKS, batch=st.integers(4, 9), packing=st.sampled_from(["best_fit", "concat"]), seed=st.integers(0, 99))
def test_a_chain_of_topologies_reads_every_sample_once(
    links: list[dict[str, Any]], batch: int, packing: Any, seed: int, root: Path
) -> None:
    folders = [root / f"tokens-{number}" for number in range(3)]
    made = StreamSettings(48, packing, seed=seed, window=2, max_epochs=9)
    state: dict[str, Any] = {}
    rows: list[list[int]] = []
    for link in links:
        backend = "ddp" if link["ranks"] > 1 else "single"
        seen = run_ranks(read_steps, backend, link["ranks"], args=(folders, made, state, link | {"batch": batch}))
        for step in range(link["steps"]):
            rows += [row for steps, _ in seen for row in steps[step]]
        states = [found for _, found in seen]
        assert all(found == states[0] for found in states)
        state = json.loads(json.dumps(states[0]))
        assert len(json.dumps(state)) < 1024
    oracle, _ = read_steps(folders, made, {}, {"steps": 1, "batch": len(rows), "micro": None})
    assert rows == oracle[0]
    assert state["samples"] == len(rows) == batch * sum(link["steps"] for link in links)


def test_another_dataset_or_seed_is_refused(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    assert start(config, "single", 1, fault="step@0:7") is None
    folder = root / "tokens-1"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    for path in kept:
        path.unlink()
    tiny_tokens(folder, 60, seed=9)
    try:
        seen = start(config, "single", 1)
    finally:
        for path in folder.iterdir():
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
    assert seen is not None
    assert "other data" in seen[0]["error"]
    seen = start(make_config(root, tmp_path / "run", weights=(1, 1)), "single", 1)
    assert seen is not None
    assert "data.weights" in seen[0]["error"]


def test_rows_say_which_tokens_count(root: Path) -> None:
    stream = Stream([root / "tokens-0"], StreamSettings(48, "best_fit"))
    batch = stream.batch(range(20), document_ids=True)
    held = batch["document_ids"] >= 0
    assert held.any(axis=1).all()
    assert not held.all()
    assert (batch["labels"][~held] == -100).all()
    assert np.array_equal(
        batch["labels"][:, :-1][batch["labels"][:, :-1] >= 0], batch["input_ids"][:, 1:][batch["labels"][:, :-1] >= 0]
    )


def test_parity_records_the_same_steps_with_unequal_targets(root: Path, tmp_path: Path) -> None:
    records = {}
    for backend, ranks in (("single", 1), ("fsdp", 2), ("zero3", 2)):
        config = make_config(root, tmp_path / "run")
        probe = ProbeConfig(folder=tmp_path / backend, steps=3)
        seen = start(config.model_copy(update={"probe": probe}), backend, ranks)
        assert seen is not None
        assert [facts["error"] for facts in seen] == [None] * ranks
        records[backend] = json.loads((tmp_path / backend / "record.json").read_text())["steps"]
    for backend in ("fsdp", "zero3"):
        for one, two in zip(records[backend], records["single"], strict=True):
            assert one["samples"] == two["samples"]
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
        assert all(len(set(step["targets_per_rank"])) == 2 for step in records[backend])
