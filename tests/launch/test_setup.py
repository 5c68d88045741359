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
