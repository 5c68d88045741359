"""The README's commands are real: each is parsed, planned or printed by the program it names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from tests.support_matrix import MARK, matrix

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
GROUPS = ("checkpoint", "data", "adapter")


def test_the_readme_holds_the_commands_that_are_tested_here() -> None:
    assert len(COMMANDS) == 38
    assert not [c for c in COMMANDS if shlex.split(c)[0] not in ("bash", "accelerate", "samestep")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("bash ")])
def test_scripts_exist_and_parse(command: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / command.split()[1])]).returncode == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("accelerate launch")])
def test_launch_lines_resolve_their_settings(command: str) -> None:
    words = shlex.split(command)[2:]
    if words[0] == "--config_file":
        assert (ROOT / words[1]).is_file()
        words = words[2:]
    flags = [] if {"--help", "--print-config"} & set(words) else ["--print-config"]
    result = subprocess.run(
        [sys.executable, *words, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "optim.peak_lr" in result.stdout or "peak_lr:" in result.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("samestep run")])
def test_run_lines_pass_every_check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [*shlex.split(command)[1:], *([] if "--dry-run" in command else ["--dry-run"])]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "accelerate launch --config_file accelerate_configs/" in result.output


@pytest.mark.parametrize(
    "command",
    [
        c
        for c in COMMANDS
        if c.startswith(tuple(f"samestep {name}" for name in ("parity", "predict", "methods", *GROUPS)))
    ],
)
def test_other_lines_name_real_options(command: str) -> None:
    words = shlex.split(command)[1:]
    group = 2 if words[0] in GROUPS else 1
    result = CliRunner().invoke(app, [*words[:group], "--help"])
    options = [word for word in words if word.startswith("--")]
    assert result.exit_code == 0
    assert all(option in result.output for option in options)


def test_the_support_matrix_is_what_the_tests_recorded() -> None:
    readme = (ROOT / "README.md").read_text()
    assert MARK + matrix() in readme
    assert matrix().count("tested") == 60
