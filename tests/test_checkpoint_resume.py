"""Whether a run starts, continues or has ended: settings against what the checkpoints say. No torch, no ranks."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from trainer.checkpoint.manifest import STATE, Manifest, manifest_text
from trainer.checkpoint.resume import OUTCOME, decide_start
from trainer.config import (
    ClassificationData,
    LoraConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
    may_change,
)
from trainer.config.section import MayChange
from trainer.errors import CheckpointError, ConfigError
from trainer.run_folder import JOB_FILE

MAY_CHANGE = {
    "RunConfig": {"name", "run_dir", "probe"},
    "ModelConfig": {"attention", "gradient_checkpointing", "trust_remote_code"},
    "QloraConfig": {"compute_dtype"},
    "LiveData": {"max_epochs"},
    "StreamData": {"cache", "cache_gb", "max_epochs", "sources", "validation", "validation_rows"},  # what rows there are is in their digest
    "InstructData": {"generate", "new_tokens", "validation_rows"},
    "PairData": {"generate", "new_tokens", "num_beams", "validation_rows"},
    "QuestionData": {"validation_rows"},
    "TrainConfig": {
        *("micro_batch_size", "eval_batch_size", "eval_every", "log_every", "patience", "save_every", "keep_last", "resume"),
        *("extend", "deterministic", "on_nonfinite", "on_spike", "spike_factor", "max_skipped_steps", "max_rollbacks"),
        *("time_limit_minutes", "hang_timeout_s", "ddp_find_unused_parameters"),
    },
}  # fmt: skip
"""Of every variant of every section; what is not named here must match."""


def config(run: Path, **train: Any) -> RunConfig:
    return RunConfig(name="r", run_dir=run, train=TrainConfig(**({"num_epochs": 3} | train)))


def saved(made: RunConfig, step: int = 10) -> Path:
    """A folder with what the decision reads; whether it is whole is not asked here."""
    folder = made.folder / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / STATE).write_text(json.dumps({"config": made.model_dump(mode="json")}))
    content = Manifest(
        format="samestep-checkpoint-1", step=step, backend="ddp", world_size=2, precision="no", metric=None,
        config_hash="0" * 64, versions={}, tensors={}, files={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest_text(content))
    return folder


def end(made: RunConfig, outcome: str) -> None:
    (made.folder / OUTCOME).write_text(json.dumps({"outcome": outcome, "step": 10}))


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def all_sections(section: type[BaseModel]) -> set[type[BaseModel]]:
    inner = [found for field in section.model_fields.values() for found in sections_in(field.annotation)]
    return {section}.union(*map(all_sections, inner))


def test_every_setting_of_every_variant_says_whether_it_may_change(tmp_path: Path) -> None:
    sections = all_sections(RunConfig)
    assert len(sections) == 26
    marked = {
        section.__name__: {name for name, field in section.model_fields.items() if MayChange in field.metadata}
        for section in sections
    }
    assert {name: fields for name, fields in marked.items() if fields} == MAY_CHANGE
    of_default = {f"train.{name}" for name in MAY_CHANGE["TrainConfig"]} | MAY_CHANGE["RunConfig"]
    of_default |= {f"model.{name}" for name in MAY_CHANGE["ModelConfig"]}
    assert set(may_change(config(tmp_path))) == of_default


def test_an_empty_folder_starts_fresh_and_a_stopped_run_continues(tmp_path: Path) -> None:
    made = config(tmp_path / "run")
    assert decide_start(made).kind == "fresh"
    older, newer = saved(made, 10), saved(made, 20)
    assert decide_start(made).checkpoints == (newer, older)
    end(made, "stopped")
    assert decide_start(made).kind == "continue"


def test_a_start_that_failed_before_its_first_checkpoint_begins_where_it_was_told_to(tmp_path: Path) -> None:
    newest = saved(config(tmp_path / "first"))
    second = config(tmp_path / "second", resume=str(tmp_path / "first"))
    second.folder.mkdir()
    end(second, "failed")  # the loss was not finite
    assert decide_start(second).checkpoints == (newest,)
    plain = config(tmp_path / "second")
    assert (decide_start(plain).kind, decide_start(plain).checkpoints) == ("fresh", ())


def test_a_finished_run_is_finished_until_it_is_extended(tmp_path: Path) -> None:
    made = config(tmp_path / "run")
    saved(made)
    end(made, "finished")
    assert decide_start(made).kind == "finished"
    assert "train.extend=true" in decide_start(made).words
    longer = config(tmp_path / "run", num_epochs=5)
    with pytest.raises(ConfigError, match=r"train.num_epochs \(5.0\) was 3.0 .*train.extend=true"):
        decide_start(longer)
    start = decide_start(config(tmp_path / "run", num_epochs=5, extend=True))
    assert start.kind == "continue"
    assert start.words == "changed since the last start: train.extend False -> True, train.num_epochs 3.0 -> 5.0"


def test_an_extended_run_that_is_finished_again_says_so(tmp_path: Path) -> None:
    made = config(tmp_path / "run", extend=True)
    saved(made)
    end(made, "finished")
    assert decide_start(made).kind == "finished"


@pytest.mark.parametrize("length", [{"num_epochs": 2}, {"num_epochs": None, "max_steps": 1000}])
def test_a_run_is_extended_in_its_own_unit_and_never_made_shorter(length: dict[str, Any], tmp_path: Path) -> None:
    saved(config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"train.num_epochs .* was 3.0 .*train.extend=true with a larger number"):
        decide_start(config(tmp_path / "run", extend=True, **length))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"optim": OptimConfig(peak_lr=1e-3)}, "optim.peak_lr"),
        ({"data": ClassificationData(source="other.csv")}, "data.source"),
        ({"method": LoraConfig()}, "method.name"),
        ({"train": TrainConfig(num_epochs=3, global_batch_size=64)}, "train.global_batch_size"),
        ({"train": TrainConfig(num_epochs=3, extend=True, seed=1)}, "train.seed"),
    ],
)
def test_a_setting_that_must_match_is_refused_with_the_difference_and_the_ways_out(
    changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    made = config(tmp_path / "run")
    saved(made)
    with pytest.raises(ConfigError) as refused:
        decide_start(made.model_copy(update=changes))
    problem = next(problem for problem in refused.value.problems if problem.startswith(name))
    assert " was " in problem
    assert "name=NEW" in problem
    assert "train.resume=never" in problem


def test_a_harmless_setting_is_accepted_and_noted(tmp_path: Path) -> None:
    saved(config(tmp_path / "run"))
    start = decide_start(config(tmp_path / "run", log_every=5, micro_batch_size=4))
    assert start.kind == "continue"
    assert start.words == "changed since the last start: train.log_every 10 -> 5, train.micro_batch_size none -> 4"


def test_never_and_probes_start_fresh_whatever_is_there(tmp_path: Path) -> None:
    made = config(tmp_path / "run")
    saved(made)
    end(made, "finished")
    assert decide_start(config(tmp_path / "run", resume="never")).kind == "fresh"
    probe = made.model_copy(update={"probe": ProbeConfig(folder=tmp_path / "probe")})
    assert decide_start(probe).kind == "fresh"


def test_never_is_heeded_once_by_a_slurm_job_that_is_restarted(tmp_path: Path) -> None:
    made = config(tmp_path / "run", resume="never")
    newest = saved(made)
    first = {"SLURM_JOB_ID": "7"}
    again = first | {"SLURM_RESTART_COUNT": "1"}
    assert (
        decide_start(made, again).kind == "fresh"
    )  # the earlier start died before it began the run: this one is older
    (made.folder / JOB_FILE).write_text("6")
    assert decide_start(made, again).kind == "fresh"
    (made.folder / JOB_FILE).write_text("7")
    assert decide_start(made, again).checkpoints == (newest,)
    assert decide_start(made, first).kind == "fresh"
    assert decide_start(made, {}).kind == "fresh"
    end(made, "finished")
    assert decide_start(made, again).kind == "finished"


def test_a_path_starts_another_run_from_a_checkpoint(tmp_path: Path) -> None:
    first = config(tmp_path / "first")
    older, newer = saved(first, 10), saved(first, 20)
    start = decide_start(config(tmp_path / "second", resume=str(older)))
    assert (start.kind, start.checkpoints, start.is_named) == ("fresh", (older,), True)
    assert decide_start(config(tmp_path / "second", resume=str(first.folder))).checkpoints == (newer,)
    assert decide_start(config(tmp_path / "first", resume=str(newer))).checkpoints == (newer, older)
    with pytest.raises(ConfigError, match="set name=NEW to branch off from it"):
        decide_start(config(tmp_path / "first", resume=str(older)))
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        decide_start(config(tmp_path / "second", resume=str(tmp_path / "nothing")))


def test_a_restarted_run_that_began_elsewhere_goes_on_from_its_own(tmp_path: Path) -> None:
    first, second = config(tmp_path / "first"), config(tmp_path / "second")
    saved(first, 10)
    own = saved(second, 30)
    start = decide_start(config(tmp_path / "second", resume=str(first.folder)))
    assert start.checkpoints == (own,)
    assert "train.resume is left aside" in start.words
