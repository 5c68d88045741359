"""Damaged and hostile checkpoints: refused or passed over, never loaded silently, never executed, never a traceback."""

import pickle
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from tests.distributed.resume_runs import make_config, train
from tests.rank_pool import run_ranks
from tests.ruin import CANARY, Canary, ruin, way_of
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.export import export_checkpoint, find_checkpoint
from trainer.checkpoint.resume import Start, decide_start
from trainer.checkpoint.store import CHECKPOINTS, describe_damage, list_checkpoints
from trainer.errors import CheckpointError, SamestepError

NUM_BAD, NUM_ON_TWO_RANKS = 500, 120
SOME = range(0, NUM_BAD, 7)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


def trained(root: Path, backend: str, ranks: int) -> Path:
    """A run with checkpoints of steps 2 and 3 (the last)."""
    config = make_config(root, root / backend, method="lora", max_steps=3)
    assert [facts["error"] for facts in run_ranks(train, backend, ranks, args=(config,))] == [None] * ranks
    return config.folder


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    return trained(root, "single", 1)


@pytest.fixture(scope="module")
def bad(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ruined copies of the run's newest checkpoint, each with the good one before it."""
    return ruin_each(run, NUM_BAD, tmp_path_factory.mktemp("bad"))


def ruin_each(run: Path, count: int, room: Path) -> list[Path]:
    newest, older = list_checkpoints(run / CHECKPOINTS)
    folders = [ruin(newest, number, room) for number in range(count)]
    for folder in folders:
        shutil.copytree(older, folder.parent / older.name)
    return folders


def restore_each(root: Path, folders: list[Path]) -> list[tuple[str, list[str]]]:
    """On every rank: offer every bad checkpoint, with the good one behind it. How it ended, and what was said."""
    from trainer.backend import build_accelerator
    from trainer.loop import Trainer
    from trainer.model.load import build_model
    from trainer.task import build_task

    config = make_config(root, root / "other", method="lora", max_steps=3)
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    trainer = Trainer(config, accelerator, build_model(config, task.label_names, accelerator), task)
    outcomes = []
    for folder in folders:
        said: list[str] = []
        trainer.checkpoints.say = said.append
        try:
            progress = trainer.checkpoints.restore(Start("continue", tuple(list_checkpoints(folder.parent))))
            outcome = f"step {progress.step}"
        except CheckpointError as error:
            outcome = f"refused: {error}"
        outcomes.append((outcome, said))
    return outcomes


def assert_refused_or_passed_over(outcomes: list[tuple[str, list[str]]]) -> None:
    for number, (outcome, said) in enumerate(outcomes):
        if outcome.startswith("refused: "):
            assert way_of(number).startswith("forge"), (number, way_of(number), outcome)
        else:
            assert outcome == "step 2", (number, way_of(number), outcome)  # the older one
            assert said[0].startswith("checkpoint passed over: "), (number, way_of(number), said)


def test_the_canary_is_left_where_a_pickle_is_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / CANARY)))
    assert (tmp_path / CANARY).exists()


def test_500_bad_checkpoints_are_refused_or_passed_over(root: Path, bad: list[Path]) -> None:
    (outcomes,) = run_ranks(restore_each, "single", 1, args=(root, bad), timeout_s=300)
    assert len(outcomes) == NUM_BAD
    assert_refused_or_passed_over(outcomes)
    assert len({outcome for outcome, _ in outcomes}) > 20
    assert not list(bad[0].parents[2].rglob(CANARY))


def test_two_ranks_refuse_bad_checkpoints_of_their_own_alike(root: Path, tmp_path: Path) -> None:
    folders = ruin_each(trained(root, "ddp", 2), NUM_ON_TWO_RANKS, tmp_path)
    first, second = run_ranks(restore_each, "ddp", 2, args=(root, folders), timeout_s=300)
    assert [outcome for outcome, _ in first] == [outcome for outcome, _ in second]
    assert_refused_or_passed_over(first)
    assert not list(tmp_path.rglob(CANARY))


def exit_code(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *words])
    return ended.value.code


def test_the_commands_and_the_start_of_a_run_survive_every_bad_checkpoint(root: Path, bad: list[Path]) -> None:
    found = set()
    for number, folder in enumerate(bad):
        is_forged = way_of(number).startswith("forge")
        verified, inspected = exit_code("verify", str(folder)), exit_code("inspect", str(folder))
        assert verified in ((0, 3) if is_forged else (3,)), (number, way_of(number), verified)
        assert inspected in ((0, 2) if is_forged else (2,)), (number, way_of(number), inspected)
        assert number not in SOME or exit_code("list", str(folder.parents[1])) == 0
        try:
            kind = decide_start(make_config(root, folder.parents[1], method="lora", max_steps=3)).kind
        except SamestepError as error:
            kind = type(error).__name__
        found.add((verified, inspected, kind))
    assert {(3, 2, "continue"), (0, 0, "continue"), (0, 2, "continue")} <= found
    assert not list(bad[0].parents[2].rglob(CANARY))


def test_no_bad_checkpoint_is_exported_as_something_else(run: Path, bad: list[Path], tmp_path: Path) -> None:
    export_checkpoint(list_checkpoints(run / CHECKPOINTS)[0], tmp_path / "good")
    good, num_exported = (tmp_path / "good" / "adapter_model.safetensors").read_bytes(), 0
    for number in SOME:
        target = tmp_path / str(number)
        try:
            export_checkpoint(find_checkpoint(bad[number]), target)
        except SamestepError:
            assert not target.exists()
            continue
        assert (target / "adapter_model.safetensors").read_bytes() == good, number
        num_exported += 1
    assert 0 < num_exported < len(SOME) / 2  # what was forged is of no concern to an export
    assert not list(bad[0].parents[2].rglob(CANARY))


def test_verify_names_the_file(run: Path, bad: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1, 2, 3, 5, 7):
        exit_code("verify", str(bad[number]))
        assert "DAMAGED: " in capsys.readouterr().out
    assert exit_code("verify", str(run)) == 0


def test_a_whole_checkpoint_has_no_damage(run: Path) -> None:
    assert [describe_damage(folder) for folder in list_checkpoints(run / CHECKPOINTS)] == [None, None]
