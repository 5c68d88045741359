"""A run that ends at any moment goes on as if it had not: bit for bit under the same topology, exactly placed under any other."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.resume_runs import (
    NUM_STEPS,
    make_config,
    metrics_of,
    same_weights,
    saved_at_the_end,
    start,
    train,
)
from tests.rank_pool import BACKENDS, run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer import output
from trainer.config import OptimConfig, RunConfig

TOPOLOGIES = [
    *[("single", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2)],
    pytest.param("zero1", 2, marks=pytest.mark.slow),
    *[pytest.param(backend, 3, marks=pytest.mark.slow) for backend in BACKENDS if backend != "single"],
]
OTHERS = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("single", "zero1", "zero2")]
SAVE_POINTS = [
    "save.weights@0:2", "save.weights@1:2", "save.optimizer@1:2", "save.rank@0:2", "save.state@1:2", "save.agreed:2",
    "save.manifest:2", "save.renamed:2", "save.pointer:2", "save.pruning:1", "save.pruned:2",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


_never_killed: dict[tuple[str, int, str], tuple[Path, list[dict[str, Any]]]] = {}


def never_killed(root: Path, backend: str, ranks: int, method: str = "full") -> tuple[Path, list[dict[str, Any]]]:
    """The same run without interruption: its folder, and what its ranks saw. Trained once for all tests."""
    key = (backend, ranks, method)
    if key not in _never_killed:
        run = root / f"whole-{backend}-{ranks}-{method}"
        seen = start(make_config(root, run, method=method), backend, ranks)
        assert seen is not None
        assert all(facts["error"] is None for facts in seen)
        _never_killed[key] = (run, seen)
    return _never_killed[key]


def steps_published(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def assert_went_on(
    run: Path, seen: list[dict[str, Any]] | None, whole: tuple[Path, list[dict[str, Any]]], first: int
) -> None:
    """Bit-identical: weights, moments and random numbers, counters, losses and sample ids of each rank, metrics."""
    assert seen is not None
    for facts, expected in zip(seen, whole[1], strict=True):
        assert facts["error"] is None
        assert sorted(facts["losses"]) == list(range(first, NUM_STEPS))
        for step, loss in facts["losses"].items():
            assert loss == pytest.approx(expected["losses"][step], rel=1e-6)  # a difference of running sums
            assert facts["ids"][step] == expected["ids"][step]
        assert same_weights(facts, expected)
        assert facts["counters"] == expected["counters"]
    assert metrics_of(run) == metrics_of(whole[0])
    assert saved_at_the_end(run) == saved_at_the_end(whole[0])
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert not [name for name in names if name.startswith((".tmp", ".trash"))]
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"


@pytest.mark.parametrize(("backend", "ranks"), TOPOLOGIES)
def test_after_sigkill_the_same_topology_continues_bit_for_bit(
    backend: str, ranks: int, root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run")
    assert start(config, backend, ranks, fault=f"step@{ranks - 1}:6") is None
    published = steps_published(config.folder)
    assert published
    seen = start(config, backend, ranks)
    assert_went_on(config.folder, seen, never_killed(root, backend, ranks), first=published[-1])


@pytest.mark.parametrize(
    ("backend", "point"),
    [
        *[("ddp", point) for point in SAVE_POINTS],
        *[
            pytest.param(backend, point, marks=pytest.mark.slow)
            for backend in ("fsdp", "zero2")
            for point in SAVE_POINTS
        ],
    ],
)
def test_a_kill_at_any_point_of_a_save_loses_no_finished_one(
    backend: str, point: str, root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run")
    assert start(config, backend, 2, fault=point) is None
    published = steps_published(config.folder)
    assert published
    seen = start(config, backend, 2)
    assert_went_on(config.folder, seen, never_killed(root, backend, 2), first=published[-1])


@pytest.mark.parametrize("method", ["lora", "head"])
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero3", *OTHERS])
def test_adapters_and_heads_continue_bit_for_bit_after_a_stop_request(
    backend: str, method: str, root: Path, tmp_path: Path
) -> None:
    ranks = 1 if backend == "single" else 2
    config = make_config(root, tmp_path / "run", method=method)
    stopped = start(config, backend, ranks, fault=f"step@{ranks - 1}:5:usr1")
    assert stopped is not None
    assert {facts["step"] for facts in stopped} == {5}  # in the middle of an epoch, between saves and log lines
    assert json.loads((config.folder / "outcome.json").read_text())["outcome"] == "stopped"
    whole = never_killed(root, backend, ranks, method)
    assert_went_on(config.folder, start(config, backend, ranks), whole, first=5)


WHOLE_CHAIN = [("fsdp", 2), ("single", 1), ("zero3", 2), ("ddp", 3), ("zero1", 2), ("zero2", 2), ("single", 1)]
CHAINS = {"full": WHOLE_CHAIN, "qlora": WHOLE_CHAIN, "lora": [("fsdp", 2), ("ddp", 3), ("zero2", 2), ("single", 1)]}


@pytest.mark.parametrize("method", ["full", "lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_a_chain_of_topologies_sees_the_same_samples_and_ends_close(method: str, root: Path, tmp_path: Path) -> None:
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "head_dropout": 0.0}

    def config(run: str) -> Any:
        plain = make_config(root, tmp_path / run, method=method, max_steps=14)
        return plain.model_copy(update={"model": plain.model.model_copy(update=quiet)})

    whole = start(config("whole"), "single", 1)
    assert whole is not None
    chain = CHAINS[method]
    losses: dict[int, float] = {}
    for number, (backend, ranks) in enumerate(chain):
        fault = "" if number == len(chain) - 1 else "step@0:2:usr1"  # each but the last takes two steps
        seen = start(config("chain"), backend, ranks, fault=fault)
        assert seen is not None
        for step in seen[0]["losses"]:
            losses[step] = sum(facts["losses"][step] for facts in seen)
            assert seen[0]["ids"][step] == whole[0]["ids"][step]
    assert losses == pytest.approx(whole[0]["losses"], rel=1e-5)
    log = (tmp_path / "chain" / "log.txt").read_text(encoding="utf-8")
    assert f"saved by fsdp on 2, continued by {chain[1][0]} on {chain[1][1]}" in log
    assert "dropout draws anew from (seed, step, rank)" in log


def killed_in_report(config: RunConfig) -> None:
    """Training is over and saved, its last lines are not logged."""
    output.RunOutput.report = lambda *_: os._exit(9)  # type: ignore[assignment,method-assign,misc]
    train(config)


def without_room(config: RunConfig) -> dict[str, Any]:
    """The device is too small for the exported model beside training."""

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError

    output.load_exported = lambda *_: (SimpleNamespace(to=refuse), None, None)  # type: ignore[assignment]
    return train(config)


def test_a_run_that_is_over_but_for_its_report_ends_on_other_ranks(root: Path, tmp_path: Path) -> None:
    """It stopped early, with sums that were not logged yet: all ranks must agree that there are any."""
    config = make_config(
        root, tmp_path / "run", max_steps=100, log_every=100, eval_every=2, patience=1, metric="loss", save_every=2
    )
    config = config.model_copy(update={"optim": OptimConfig(peak_lr=1e-12, head_lr=1e-12)})
    with pytest.raises(AssertionError, match="died or timed out"):
        start(config, "ddp", 2, body=killed_in_report)
    seen = start(config, "ddp", 3)
    assert seen is not None
    assert [facts["error"] for facts in seen] == [None] * 3
    assert seen[0]["step"] < 100
    assert any("train/loss" in line for line in metrics_of(config.folder))


def test_a_model_without_room_on_the_device_ends_a_run_that_counts_as_finished(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", max_steps=2)
    seen = start(config, "single", 1, body=without_room)
    assert seen is not None
    assert "training is finished and the model is whole, but it was not tested" in str(seen[0]["error"])
    assert json.loads((config.folder / "outcome.json").read_text()) == {"outcome": "finished", "step": 2}


def test_a_finished_run_says_so_and_is_left_alone(root: Path) -> None:
    run, _ = never_killed(root, "ddp", 2)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    seen = start(make_config(root, run), "ddp", 2)
    assert seen is not None
    assert all(facts["error"].startswith("AlreadyFinished: ") for facts in seen)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_branch_of_a_finished_run_evaluates_exports_and_ends(root: Path, tmp_path: Path) -> None:
    run, _ = never_killed(root, "ddp", 2)
    branch = make_config(root, tmp_path / "branch", resume=str(run))
    seen = start(branch, "ddp", 2)
    assert seen is not None
    assert [facts["error"] for facts in seen] == [None, None]
    assert [facts["losses"] for facts in seen] == [{}, {}]  # not a step more
    assert json.loads((branch.folder / "outcome.json").read_text()) == {"outcome": "finished", "step": NUM_STEPS}
    assert [line["step"] for line in metrics_of(branch.folder) if "eval/loss" in line] == [NUM_STEPS]


@pytest.mark.parametrize("backend", ["ddp", *(pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS if b != "ddp")])
def test_a_kill_right_after_an_epochs_edge_continues_bit_for_bit(backend: str, root: Path, tmp_path: Path) -> None:
    ranks = 1 if backend == "single" else 2
    config = make_config(root, tmp_path / "run", save_every=7, eval_every=4)
    assert start(config, backend, ranks, fault="save.pruned:1") is None
    assert steps_published(config.folder) == [7]
    assert_went_on(config.folder, start(config, backend, ranks), never_killed(root, backend, ranks), first=7)


def test_a_damaged_checkpoint_is_passed_over_loudly_and_an_explicit_path_to_it_refused(
    root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run")
    assert start(config, "ddp", 2, fault="step@0:8") is None
    older, newest = steps_published(config.folder)[-2:]
    folder = config.folder / "checkpoints" / f"step-{newest:08d}"
    shard = folder / "weights-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    explicit = config.model_copy(update={"train": config.train.model_copy(update={"resume": str(folder)})})
    explicit = explicit.model_copy(update={"run_dir": tmp_path / "branch"})
    for facts in refused(explicit):
        assert "names a damaged checkpoint" in facts["error"]
        assert "BLAKE3 differs" in facts["error"]
    assert_went_on(config.folder, start(config, "ddp", 2), never_killed(root, "ddp", 2), first=older)
    log = (config.folder / "log.txt").read_text(encoding="utf-8")
    assert f"checkpoint passed over: {shard} was changed after it was written" in log
    assert f"{folder.name} is set aside as {folder.name}.aside-" in log


def test_another_base_or_other_data_is_refused(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", method="lora", max_steps=4)
    moved = {"model": tmp_path / "model", "data": tmp_path / "data.csv"}
    tiny_bert(moved["model"])
    tiny_sentences(moved["data"], rows=160)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"source": str(moved["model"])}),
            "data": config.data.model_copy(update={"source": str(moved["data"])}),
        }
    )
    assert start(config, "ddp", 2, fault="save.pruned:1") is None  # the first checkpoint is there
    tiny_sentences(moved["data"], rows=160, seed=1)
    for facts in refused(config):
        assert "was trained on other data than the settings of section data name now" in facts["error"]
    tiny_sentences(moved["data"], rows=160)
    change_weights(moved["model"])
    for facts in refused(config):
        assert "was trained on another base model than model.source" in facts["error"]


def refused(config: Any) -> list[dict[str, Any]]:
    seen = start(config, "ddp", 2)
    assert seen is not None
    assert len(seen) == 2
    return seen


def change_weights(model: Path) -> None:
    """Another model of the same architecture under the same name."""
    from transformers import BertModel

    other = BertModel.from_pretrained(model)
    other.encoder.layer[1].output.dense.weight.data.mul_(1.01)
    other.save_pretrained(model)


def test_stop_requests_that_come_twice_and_during_a_save_stop_once(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    stopped = start(config, "ddp", 2, fault="save.weights@1:1:usr1,save.rank@1:1:usr1,save.agreed:1:usr1")
    assert stopped is not None
    (step,) = {facts["step"] for facts in stopped}
    assert step in (
        3,
        4,
        5,
    )  # the flag is summed in a later step, but the save of step 4 waits for the one that raised it
    assert_went_on(config.folder, start(config, "ddp", 2), never_killed(root, "ddp", 2), first=step)


def test_a_stop_before_the_first_step_ends_is_saved_too(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    stopped = start(config, "fsdp", 2, fault="step@0:1:usr1")
    assert stopped is not None
    assert [facts["step"] for facts in stopped] == [1, 1]
    assert_went_on(config.folder, start(config, "fsdp", 2), never_killed(root, "fsdp", 2), first=1)


def train_and_copy_what_is_printed(config: RunConfig, folder: Path) -> None:
    """As `train`, with standard output and error of each rank in a file of its own, and more of it than usual."""
    for number in (1, 2):
        os.dup2(os.open(folder / f"rank-{os.environ['RANK']}-{number}", os.O_WRONLY | os.O_CREAT), number)
    logging.getLogger().setLevel(logging.DEBUG)
    train(config)


def test_no_secret_of_the_environment_is_printed_or_reaches_the_run_directory(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", max_steps=2)
    secret = "hf_" + "s3cr3t" * 5
    environ = {"HF_TOKEN": secret, "WANDB_API_KEY": secret}
    run_ranks(train_and_copy_what_is_printed, "ddp", 2, args=(config, tmp_path), environ=environ)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert (tmp_path / "rank-0-1").stat().st_size > 0
    assert not [path for path in files if secret.encode() in path.read_bytes()]
