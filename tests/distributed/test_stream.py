"""Pretraining data under any topology: real processes read the samples of one order, and learn the same. Kills: test_stream_recipe.py."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.stream.oracle import Rules, samples_of
from tests.distributed.resume_runs import metrics_of, start, train
from tests.rank_pool import BACKENDS, run_ranks
from tests.tiny import NUM_WORDS, tiny_llama, tiny_tokens
from trainer.config import ModelConfig, OptimConfig, ProbeConfig, RunConfig, StreamData, TrainConfig
from trainer.data.batches import micro_batches
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


def trimmed(row: list[int]) -> list[int]:
    """A row without its padding: what stands behind the last end of a document, where that is zeros."""
    last = max((place for place, token in enumerate(row) if token == NUM_WORDS), default=-1)
    return row if any(row[last + 1 :]) else row[: last + 1]


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


def test_the_run_leaves_a_model_samples_and_its_metrics(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole, seen = never_killed(root)
    model, tokenizer = (kind.from_pretrained(whole / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer) == 61
    assert tokenizer.decode([3, 10]) == "w3 w10"
    lines = metrics_of(whole)
    assert {"train/loss", "train/bits_per_byte", "train/padding", "train/lr"} <= lines[0].keys()
    words = r"step 10/10  loss \S+ nats  \S+ bits/byte  .* tokens/s  [\d,]+ tokens seen  padding \S+%"
    assert re.search(words, (whole / "log.txt").read_text())
    held = sum(1 for facts in seen for rows in facts["rows"].values() for row in rows for token in trimmed(row))
    assert lines[NUM_STEPS]["tokens_seen"] == held
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_byte"} <= lines[-1].keys()
    assert lines[-2]["eval/loss"] < lines[0]["train/loss"] - 0.3  # it learned
    assert "[...]" in (whole / "samples.txt").read_text()
    for name, tensor in seen[0]["weights"].items():
        assert torch.equal(model.get_parameter(name).detach(), torch.from_numpy(tensor)), name


def read_steps(folders: list[Path], rules: Rules, first: int, plan: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What one rank reads from a sample on: for each step its rows, every array of them; runs on every rank."""
    stages = [Stage(start, tuple(weights)) for start, weights in rules.stages]
    made = StreamSettings(rules.length, rules.packing, rules.isolate, rules.seed, rules.window, max_epochs=9)  # type: ignore[arg-type]
    stream = Stream(folders, made, stages=stages, plan_folder=folders[0].parent / "plans")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    steps = []
    for step in range(plan["steps"]):
        ids = np.arange(first + step * plan["batch"], first + (step + 1) * plan["batch"])
        rows: list[dict[str, Any]] = []
        for part in micro_batches(ids, rank, world_size, plan["micro"]):
            batch = stream.batch(part.tolist())
            del batch["num_tokens"]
            rows += [{name: array[row].tolist() for name, array in batch.items()} for row in range(len(part))]
        steps.append(rows)
    return steps


LINKS = st.lists(
    st.fixed_dictionaries(
        {"ranks": st.integers(1, 4), "steps": st.integers(1, 5), "micro": st.sampled_from([None, 1, 3])}
    ),
    min_size=2,
    max_size=4,
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(links=LINKS, batch=st.integers(4, 9), packing=st.sampled_from(["best_fit", "concat"]), seed=st.integers(0, 99))
def test_a_chain_of_topologies_reads_every_sample_of_the_oracle_once(
    links: list[dict[str, Any]], batch: int, packing: str, seed: int, root: Path
) -> None:
    folders = [root / f"tokens-{number}" for number in range(3)]
    rules = Rules(48, packing, isolate=True, seed=seed, window=2, stages=[(0, [3, 1, 1]), (20, [1, 1, 4])])
    rows: list[dict[str, Any]] = []
    for link in links:
        backend = "ddp" if link["ranks"] > 1 else "single"
        seen = run_ranks(read_steps, backend, link["ranks"], args=(folders, rules, len(rows), link | {"batch": batch}))
        for step in range(link["steps"]):
            rows += [row for steps in seen for row in steps[step]]
    assert len(rows) == batch * sum(link["steps"] for link in links)
    assert rows == samples_of(folders, rules, len(rows))


def test_data_may_move_and_other_data_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    assert start(make_config(root, tmp_path / "run"), "single", 1, fault="step@0:7") is None
    tiny_tokens(tmp_path / "other", 60, seed=9)
    first, second = (str(root / f"tokens-{number}") for number in range(2))
    for changed, words in (
        (
            {"sources": (first, str(tmp_path / "other"))},
            r"other data .*\(data.sources\[1\] was dataset \w+ and is \w+\)",
        ),
        ({"validation": second}, r"\(data.validation was dataset \w+ and is"),
        ({"weights": (1, 1)}, r"data\.weights"),
    ):
        seen = start(make_config(root, tmp_path / "run", **changed), "single", 1)
        assert seen is not None
        assert re.search(words, seen[0]["error"])
    moved = tmp_path / "moved"
    shutil.copytree(root, moved, ignore=shutil.ignore_patterns("whole", "cache"))
    places = {"sources": tuple(str(moved / f"tokens-{n}") for n in range(2)), "validation": str(moved / "tokens-2")}
    seen = start(make_config(root, tmp_path / "run", **places, max_epochs=9), "single", 1)
    assert seen is not None
    assert seen[0]["error"] is None
    assert_same_curve(tmp_path / "run", never_killed(root)[0])


def train_on_own_copy(config: RunConfig, copies: dict[int, str]) -> dict[str, Any]:
    """A start in which some ranks read copies of the first source; runs on every rank."""
    own = copies.get(int(os.environ["RANK"]))
    changed = {} if own is None else {"sources": (own, *config.data.sources[1:])}  # type: ignore[union-attr]
    return train(config.model_copy(update={"data": config.data.model_copy(update=changed)}))


def test_damage_that_one_rank_finds_is_an_error_on_all(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root / "tokens-0", copy)
    for path in copy.glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    seen = run_ranks(train_on_own_copy, "ddp", 2, args=(make_config(root, tmp_path / "run"), {1: str(copy)}))
    for facts in seen:
        assert re.search(r"copy/shard-\d+\.bin: bytes from 0 on were changed .*\(found by rank 1\)", facts["error"])


def train_on_own_validation(config: RunConfig, copies: dict[int, str]) -> dict[str, Any]:
    """The same for the held-out rows, and how long it took."""
    own, began = copies.get(int(os.environ["RANK"])), time.monotonic()
    changed = {} if own is None else {"validation": own}
    facts = train(config.model_copy(update={"data": config.data.model_copy(update=changed)}))
    return facts | {"seconds": time.monotonic() - began}


def test_damage_of_held_out_rows_that_one_rank_finds_is_an_error_on_all(root: Path, tmp_path: Path) -> None:
    config, copy = make_config(root, tmp_path / "run"), tmp_path / "copy"
    shutil.copytree(root / "tokens-2", copy)
    for path in copy.glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    words = r"copy/shard-\d+\.bin: bytes from 0 on were changed .*\(found by rank 1\)"
    for facts in run_ranks(train_on_own_validation, "ddp", 2, args=(config, {1: str(copy)})):
        assert re.search(words, facts["error"])
        assert facts["error"].startswith("DataError")
        assert 0 < facts["seconds"] < 30
    finished = start(config, "ddp", 2)  # at the checkpoint before the evaluation
    assert finished is not None
    assert [facts["error"] for facts in finished] == [None, None]
    (config.folder / "outcome.json").unlink()
    for facts in run_ranks(train_on_own_validation, "ddp", 2, args=(config, {1: str(copy)})):  # in the report alone
        assert re.search(words, facts["error"])


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
