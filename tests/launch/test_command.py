"""The `accelerate launch` line of a run, without starting it."""

import os
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from launch.command import (
    RunOptions,
    backend_file,
    backend_names,
    display_line,
    launch_command,
    launch_environment,
    processes_of,
)

RECIPE = Path("recipes/lora_sst2.py")


def test_backends_are_the_files_of_the_accelerate_configurations() -> None:
    names = backend_names()
    assert {"single", "ddp", "fsdp", "zero1", "zero2", "zero3"} <= set(names)
    assert [backend_file(name).is_file() for name in names] == [True] * len(names)
    assert (processes_of("single"), processes_of("ddp")) == (1, 2)


@pytest.mark.parametrize("backend", backend_names())
def test_the_line_is_understood_by_accelerate(backend: str) -> None:
    options = RunOptions(RECIPE, backend, 3, "bf16", (Path("a.yaml"),), ("optim.peak_lr=1", "data.text=a b"))
    command = launch_command(options)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    arguments = launch_command_parser().parse_args(command[3:])
    assert (arguments.num_processes, arguments.mixed_precision, arguments.cpu) == (3, "bf16", False)
    assert Path(arguments.config_file).samefile(backend_file(backend))
    assert arguments.training_script == str(RECIPE)
    assert arguments.training_script_args == ["--config", "a.yaml", "optim.peak_lr=1", "data.text=a b"]


def test_two_runs_on_one_machine_get_ports_of_their_own() -> None:
    words = launch_command(RunOptions(RECIPE, "ddp", 2))
    assert words[words.index("--main_process_port") + 1] == "0"
    assert "--main_process_port" not in launch_command(RunOptions(RECIPE, "single"))


@pytest.mark.parametrize(
    ("backend", "processes", "expected"),
    [
        (None, None, ("single", 1)),
        (None, 1, ("single", 1)),
        (None, 4, ("ddp", 4)),
        ("single", None, ("single", 1)),
        ("fsdp", None, ("fsdp", 2)),
        ("zero3", 3, ("zero3", 3)),
        ("nonsense", None, ("nonsense", 1)),
    ],
)
def test_backend_and_processes_are_decided_from_each_other(
    backend: str | None, processes: int | None, expected: tuple[str, int]
) -> None:
    done = RunOptions(RECIPE, backend, processes).complete()
    assert (done.backend, done.processes) == expected


def test_cores_are_shared_out_to_ranks_unless_the_user_decided() -> None:
    cores = len(os.sched_getaffinity(0))
    assert launch_environment(RunOptions(RECIPE), {}) == {"OMP_NUM_THREADS": str(cores)}
    assert launch_environment(RunOptions(RECIPE, "ddp", 2), {}) == {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert launch_environment(RunOptions(RECIPE, "ddp", 999), {}) == {"OMP_NUM_THREADS": "1"}
    assert launch_environment(RunOptions(RECIPE, "ddp", 2), {"OMP_NUM_THREADS": "7"}) == {}


def test_the_printed_line_can_be_copied_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(backend_file("ddp").resolve().parents[1])
    options = RunOptions(RECIPE, "ddp", 2, overrides=("data.text=a b", "name=x"))
    assert display_line(options, {"OMP_NUM_THREADS": "1"}) == (
        "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 --mixed_precision no "
        "--main_process_port 0 recipes/lora_sst2.py 'data.text=a b' name=x"
    )
    words = shlex.split(display_line(options, {}))
    assert words[0].startswith("OMP_NUM_THREADS=")
    assert words[3:] == launch_command(options)[3:]
