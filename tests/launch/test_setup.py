"""Setting up: quick when nothing changed, and every missing piece is named with what to install. No network is used."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"))
TOOLS = "awk bash cat chmod cp date df dirname flock grep id ln mkdir mv python3 rm sed tail touch".split()


def _setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = ["bash", str(folder / "launch" / "setup.sh"), *arguments]
    names = {"PYTHON": sys.executable, **environment}
    return subprocess.run(argv, env=os.environ | names, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What setup.sh reads, in a folder that was never set up."""
    shutil.copytree(ROOT / "launch", tmp_path / "clone" / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "clone")
    return tmp_path / "clone"


@pytest.fixture
def few_tools(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: the tools of any machine, and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    return folder


def test_every_script_is_sound() -> None:
    assert len(SCRIPTS) >= 4
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_setup_takes_about_a_second_when_nothing_changed() -> None:
    first = _setup(ROOT)
    assert first.returncode == 0, first.stderr
    started = time.monotonic()
    second = _setup(ROOT)
    assert time.monotonic() - started < 3
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_a_missing_compiler_is_named_before_anything_is_made(clone: Path, few_tools: Path) -> None:
    done = _setup(clone, PATH=str(few_tools), CXX="")
    assert done.returncode == 2
    assert "no C++ compiler: c++ was not found" in done.stderr and "apt-get install g++" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_missing_python_is_named(clone: Path) -> None:
    done = _setup(clone, PYTHON="python3.99")
    assert done.returncode == 2
    assert done.stderr == (
        "samestep setup: python3.99 was not found; install Python 3.10 or newer "
        "(apt-get install python3 python3-venv python3-dev), or set PYTHON.\n"
    )


def test_too_little_disk_is_named_with_the_space_needed(clone: Path, few_tools: Path) -> None:
    (few_tools / "df").unlink()
    (few_tools / "df").write_text("#!/bin/sh\necho Filesystem\necho /dev/x 9 9 2100000 99% /\n")
    (few_tools / "df").chmod(0o755)
    done = _setup(clone, PATH=f"{few_tools}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert f"2 GB are free in {clone}, and 4 GB are needed" in done.stderr
    assert not (clone / ".venv").exists()


def test_without_network_setup_says_what_to_check_and_a_half_made_environment_is_not_kept(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".samestep-unfinished").touch()
    (clone / ".venv" / "half-made").touch()
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "1"}
    done = _setup(clone, **offline, PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="")
    assert done.returncode == 2
    assert "connection broken by" in done.stderr
    assert "Check the network, the proxy (HTTPS_PROXY) and the package index" in done.stderr
    assert "Traceback" not in done.stderr
    assert (clone / ".venv" / "bin" / "python").exists()
    assert not (clone / ".venv" / "half-made").exists()
    assert not list((clone / ".venv").glob(".samestep-stamp*"))


def test_an_unknown_option_is_refused(clone: Path) -> None:
    done = _setup(clone, "--bnech")
    assert (done.returncode, done.stderr) == (
        2,
        "samestep setup: unknown arguments: --bnech; the only option is --bench.\n",
    )


def test_what_is_installed_is_what_the_constraints_pin() -> None:
    base = (ROOT / "launch" / "constraints.txt").read_text().partition("# Benchmark peers")[0]
    pins = [Requirement(line) for line in base.splitlines() if line and not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    assert len(here) >= 80
    assert {pin.name for pin in here if importlib.metadata.version(pin.name) not in pin.specifier} == set()


def test_every_package_folder_is_listed_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = [file.parent for top in ("launch", "trainer") for file in (ROOT / top).rglob("__init__.py")]
    assert len(found) >= 6
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in found)


# launch/test.sh. What it calls is a stand-in that notes its arguments; the rest is the script itself.


def _stand_in(tools: Path, name: str, line: str) -> None:
    (tools / name).unlink(missing_ok=True)
    (tools / name).write_text(f"#!/bin/sh\n{line}\n")
    (tools / name).chmod(0o755)


def _test_sh(clone: Path, tools: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = ["bash", str(clone / "launch" / "test.sh"), *arguments]
    return subprocess.run(argv, env=os.environ | {"PATH": str(tools)}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def asked(clone: Path, few_tools: Path, tmp_path: Path) -> Path:
    """Where apt-get notes what it is asked, as root, on a machine without a compiler and Python's headers; setup.sh ends with 7."""
    (clone / "launch" / "setup.sh").write_text("exit 7\n")
    _stand_in(few_tools, "id", "echo 0")
    _stand_in(few_tools, "apt-get", f'echo "$@" >>{tmp_path / "asked"}')
    return tmp_path / "asked"


def test_as_root_the_tests_install_what_is_missing_and_go_on(clone: Path, few_tools: Path, asked: Path) -> None:
    done = _test_sh(clone, few_tools)
    assert (done.returncode, done.stdout) == (7, "samestep test: installing python3-dev g++\n"), done.stderr
    assert asked.read_text() == "-qq update\n-qq install -y python3-dev g++\n"


def test_others_are_told_what_to_install(clone: Path, few_tools: Path, asked: Path) -> None:
    _stand_in(few_tools, "id", "echo 1000")
    done = _test_sh(clone, few_tools)
    assert (done.returncode, asked.exists()) == (2, False)
    assert done.stderr == (
        "samestep test: missing: python3-dev g++. On Debian or Ubuntu: sudo apt-get install python3-dev g++\n"
    )


def test_an_installation_that_fails_is_one_message(clone: Path, few_tools: Path, asked: Path) -> None:
    _stand_in(few_tools, "apt-get", "exit 100")
    done = _test_sh(clone, few_tools)
    assert done.returncode == 2
    assert done.stderr.startswith("samestep test: apt-get could not install python3-dev g++ (see above); check the net")


def test_all_runs_each_cell_of_the_support_matrix_once_and_records_it_anew(clone: Path, few_tools: Path) -> None:
    """Without what an earlier recording said, so that a cell that fails now does not stay tested."""
    (clone / "launch" / "setup.sh").write_text("exit 0\n")
    recorded = clone / "tests" / "distributed" / "support.json"
    recorded.parent.mkdir(parents=True)
    for tool in ("ruff", "mypy", "c++", "python3-config"):
        _stand_in(few_tools, tool, "exit 0")
    _stand_in(few_tools, "python", f'[ -e {recorded} ] && echo "old record"; echo "$SAMESTEP_RECORD" "$@"')
    methods = "tests/distributed/test_methods.py"
    recorded.touch()
    assert _test_sh(clone, few_tools, "--all", methods).stdout.splitlines() == [
        "old record", f" -m pytest -m all {methods}",
    ]  # fmt: skip
    assert _test_sh(clone, few_tools, "--all").stdout.splitlines() == [
        "old record", f" -m pytest -m all --ignore={methods}", f"1 -m pytest -m  {methods}", " tests/support_matrix.py",
    ]  # fmt: skip
