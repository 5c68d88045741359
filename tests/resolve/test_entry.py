"""`run_recipe`: printing, help, errors and exit codes of a recipe, on one rank and on several."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.resolve.cases import DEFAULTS, FULL, resolved, write
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.resolve import load_config, run_recipe
from trainer.resolve.fields import fields_of

ROOT = Path(__file__).resolve().parents[2]


def exit_code(main: Any, *argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_recipe(main, DEFAULTS, argv)
    return int(str(caught.value.code))


def never(config: RunConfig) -> None:
    raise AssertionError("must not run")


def fails(config: RunConfig) -> None:
    raise DataError("data.source (x): there is no such file; give another")


def test_recipe_runs_with_the_resolved_config() -> None:
    seen: list[RunConfig] = []
    run_recipe(seen.append, DEFAULTS, ["train.seed=5"])
    assert seen[0].train.seed == 5


def test_printed_config_shows_sources_and_can_be_given_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["optim.peak_lr=5e-4", "data.validation=v.csv"]
    run_recipe(never, DEFAULTS, [*arguments, "--print-config"])
    text = capsys.readouterr().out
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {"peak_lr: 0.0005 # command line", "rank: 4 # recipe", "alpha: 16.0 # default"} <= lines
    path = write(tmp_path / "x.yaml", text)
    assert load_config(Path(path)) == resolved(*arguments).config == resolved("--config", path, defaults=FULL).config


def test_help_shows_the_docstring_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(never, DEFAULTS, ["--help", "nonsense"])
    text = capsys.readouterr().out
    assert text.startswith(__doc__.splitlines()[0] if __doc__ else "?")
    assert [name for name in fields_of(RunConfig).leaves if f"  {name}" not in text] == []
    assert "method.rank [method=lora] = 4  (a whole number)" in text


def test_mistake_ends_with_code_2_and_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(never, "peak_lr=1", "foo") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: 2 problems\n  - ")
    assert exit_code(fails) == 2
    assert capsys.readouterr().err == "error: data.source (x): there is no such file; give another\n"


def test_ctrl_c_ends_with_code_130() -> None:
    def interrupted(config: RunConfig) -> None:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError, match="must not run"):
        run_recipe(never, DEFAULTS, [])


def test_only_rank_0_prints_the_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run_recipe(never, DEFAULTS, ["--print-config"])
    assert capsys.readouterr().out == ""


RANKED = """
import os, sys
from trainer.config import RunConfig
from trainer.errors import BackendError
from trainer.resolve import entry
entry.WAIT_FOR_RANK_0_S = float(sys.argv.pop(1))
def main(config):
    raise BackendError("a problem")
entry.run_recipe(main, RunConfig(name="x"))
"""


def start_rank(rank: str, wait_s: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": rank, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", RANKED, wait_s], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_another_rank_is_silent_while_the_launcher_ends_it_and_speaks_when_it_fails_alone() -> None:
    ended, alone = start_rank("1", "60"), start_rank("1", "0.1")
    assert alone.communicate(timeout=30)[1] == "rank 1: error: a problem\n"
    assert alone.returncode == 2
    ended.terminate()
    assert ended.communicate(timeout=30)[1] == ""


LOOKING = """
import time
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.resolve import entry
def look(config):
    print("looking", flush=True)
    time.sleep(60)
entry.input_problems = look
def main(config):
    raise DataError("a problem")
entry.run_recipe(main, RunConfig(name="x"))
"""


def test_rank_0_says_its_error_where_the_launcher_ends_it_while_it_looks_for_others() -> None:
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    rank = subprocess.Popen(
        [sys.executable, "-c", LOOKING], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "looking\n"
    rank.terminate()
    assert rank.communicate(timeout=30)[1] == "error: a problem\n"
    assert rank.returncode == 2


def test_settings_are_read_without_importing_torch() -> None:
    code = "import sys, trainer.resolve, launch.cli, launch.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
