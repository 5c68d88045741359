"""The README's commands are real: each is parsed, planned or printed by the program it names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launch.cli import app
from launch.command import RunOptions
from launch.parity_plan import plan_parity
from launch.preflight import check_parity
from tests.support_matrix import MARK, matrix
from trainer.data.assets import cache_folder

ROOT = Path(__file__).resolve().parent.parent


def commands_of(page: str) -> list[str]:
    """Every line of its bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = commands_of("README.md")
SLURM_COMMANDS = [
    c for c in (*COMMANDS, *commands_of("slurm/README.md")) if c.startswith(("samestep submit", "sbatch"))
]
COMMANDS_ALONE = ("predict", "inspect", "methods", "status", "logs", "cancel")
GROUPS = ("checkpoint", "data", "adapter", "template")


def test_the_readme_holds_the_commands_that_are_tested_here() -> None:
    assert len(COMMANDS) == 70
    assert not [c for c in COMMANDS if shlex.split(c)[0] not in ("bash", "accelerate", "samestep", "sbatch")]


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


RUN_LINES = [command for command in COMMANDS if command.startswith("samestep run")]
HEAVY = ("qlora", "summarize", "sft_smollm2", "pretrain_bart", "pretrain_xlnet")
"""Their data or weights take long to read."""


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if any(name in c for name in HEAVY) else []) for c in RUN_LINES],
)
def test_run_lines_pass_every_check(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a run directory of their own: the one they name may hold a finished run, of the README's first command."""
    monkeypatch.chdir(ROOT)
    words = [
        *shlex.split(command)[1:],
        f"run_dir={tmp_path / 'run'}",
        *([] if "--dry-run" in command else ["--dry-run"]),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "accelerate launch --config_file accelerate_configs/" in result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("samestep parity")])
def test_parity_lines_plan_variants_that_pass_every_check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = typer.main.get_command(app).commands["parity"]  # type: ignore[attr-defined]
    given = parser.make_context("parity", shlex.split(command)[2:]).params
    variants = plan_parity(*(given[name] for name in ("backends", "processes", "split", "precision")))
    check_parity(RunOptions(given["recipe"], overrides=tuple(given["overrides"] or ())), variants)
    assert len(variants) > 1


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.startswith(tuple(f"samestep {name}" for name in (*COMMANDS_ALONE, *GROUPS)))],
)
def test_other_lines_name_real_options(command: str) -> None:
    words = shlex.split(command)[1:]
    group = 2 if words[0] in GROUPS else 1
    result = CliRunner().invoke(app, [*words[:group], "--help"])
    options = [word for word in words if word.startswith("--")]
    assert result.exit_code == 0
    assert all(option in result.output for option in options)


@pytest.mark.parametrize("command", SLURM_COMMANDS)
def test_submitted_lines_make_a_script(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those with sbatch itself run in tests/slurm."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SAMESTEP_CACHE", str(cache_folder()))
    monkeypatch.setenv("HOME", str(tmp_path))
    profiles = tmp_path / ".config" / "samestep" / "clusters"
    profiles.mkdir(parents=True)
    page = (ROOT / "slurm" / "README.md").read_text()
    (profiles / "NAME.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL).group(1))  # type: ignore[union-attr]
    words = shlex.split(command)
    if words[0] == "sbatch":
        assert [word for word in words[1:] if not word.startswith("--")][:2] == [
            "slurm/train.sbatch",
            "recipes/lora_sst2.py",
        ]
        return
    result = CliRunner().invoke(app, [*words[1:], *([] if "--dry-run" in words else ["--dry-run"])])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("#!/usr/bin/env bash\n")


def test_the_support_matrix_is_what_the_tests_recorded() -> None:
    readme = (ROOT / "README.md").read_text()
    assert MARK + matrix() in readme
    assert matrix().count("tested") == 78
