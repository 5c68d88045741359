"""The command `samestep`: every mistake is one message and exit code 2, and nothing is launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig

from launch.cli import main
from launch.command import RunOptions
from launch.preflight import Machine, backend_problems, load_recipe
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = '''"""A recipe that says its name."""
import os
from trainer.config import ClassificationData, LoraConfig, ModelConfig, RunConfig, TrainConfig
from trainer.resolve import run_recipe

DEFAULTS = RunConfig(
    name="tiny",
    model=ModelConfig(source="{model}"),
    method=LoraConfig(rank=2, targets=("query", "value")),
    data=ClassificationData(source="{data}"),
    train=TrainConfig(max_steps=2, global_batch_size=4),
)


def main(config):
    print("rank", os.environ.get("RANK"), "of", config.name, "threads", os.environ["OMP_NUM_THREADS"], flush=True)


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
'''
CPU = Machine(num_gpus=0, has_bf16=True, has_deepspeed=True)
GPUS = Machine(num_gpus=4, has_bf16=True, has_deepspeed=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe on a CSV of 40 rows and the architecture of a tiny BERT."""
    rows = [f"{'good' if number % 2 else 'bad'} film {number},{'pos' if number % 2 else 'neg'}" for number in range(40)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    size = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 99,
    }
    BertConfig(**size).save_pretrained(tmp_path / "model")
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE.format(model=tmp_path / "model", data=tmp_path / "data.csv"))
    return path


def exit_code(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    return int(str(caught.value.code or 0))


def run_for_real(*argv: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", *map(str, argv)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim.peek_lr=1"], ["optim.peek_lr (1) on the command line", "did you mean `optim.peak_lr`?"]),
        (["optim.peak_lr=fast"], ["must be a number"]),
        (["--backend", "zero9"], ["--backend (zero9): must be one of", "did you mean zero"]),
        (["--backend", "single", "--processes", "2"], ["--backend single runs one process"]),
        (["--backend", "fsdp", "--processes", "1"], ["on CPU it needs at least 2 processes"]),
        (["--precision", "fp16"], ["needs a GPU"]),
        (["--precision", "bf17"], ["must be one of no, bf16, fp16"]),
        (["--backend", "ddp", "--processes", "0"], ["must be at least 1"]),
        (["--config", "nothing.yaml"], ["nothing.yaml", "no such file"]),
        (["data.source=nothing.csv"], ["nothing.csv"]),
        (["data.validation=nothing.csv"], ["nothing.csv"]),
        (["data.text=sentence"], ["sentence", "text, label"]),
        (["data.label=klass"], ["klass", "text, label"]),
        (["data.labels=neg,neutral"], ["pos", "neg, neutral"]),
        (["--processes", "5"], ["train.global_batch_size (4) is smaller than the number of processes (5)"]),
        (["method.targets=qwery"], ["qwery", "query"]),
        (["train.mixed_precision=bf16"], ["belongs to the accelerate configuration"]),
    ],
)  # fmt: skip
def test_mistake_is_one_message_and_nothing_is_launched(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert exit_code("run", recipe, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert [word for word in words if word not in printed.err] == [], printed.err
    assert "Traceback" not in printed.err


def test_yaml_that_sets_what_the_accelerate_configuration_owns_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe.parent / "x.yaml"
    path.write_text("train:\n  seed: 1\nmixed_precision: bf16\nfsdp_config: {fsdp_version: 2}\n")
    assert exit_code("run", recipe, "--config", path) == 2
    text = capsys.readouterr().err
    assert f"mixed_precision (bf16) in {path} line 3: belongs to the accelerate configuration" in text
    assert f"fsdp_config (nested values) in {path} line 4: belongs to the accelerate configuration" in text


def test_mistakes_of_all_checks_come_together(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train.seed=x", "data.text=sentence", "method.targets=qwery", "--precision", "fp16", "--backend", "single"]
    assert exit_code("run", recipe, *argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: 4 problems\n")
    assert [word for word in ("train.seed (x)", "sentence", "qwery", "--precision (fp16)") if word not in text] == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("recipes/lora_sst3.py", None, "did you mean recipes/lora_sst2.py?"),
        ("zzz/zzz.py", None, "such as recipes/lora_sst2.py"),
        ("recipe.txt", "x = 1", "must be a Python file"),
        ("recipe.py", "x = 1", "must define DEFAULTS = RunConfig"),
        ("recipe.py", "from trainer.config import *\nDEFAULTS = RunConfig(name='a/b')", "RunConfig.name (a/b)"),
    ],
)
def test_recipe_that_is_none_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, words: str
) -> None:
    monkeypatch.chdir(ROOT if text is None else tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(Path(name))
    assert f"recipe ({name})" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "machine", "words"),
    [
        (("ddp", 8, "no"), GPUS, "this machine has 4 GPUs"),
        (("zero2", 2, "no"), Machine(0, True, False), "needs the package deepspeed"),
        (("ddp", 2, "bf16"), Machine(2, False, True), "does not compute in bf16"),
    ],
)
def test_backend_that_cannot_run_here_is_refused(options: tuple[str, int, str], machine: Machine, words: str) -> None:
    (problem,) = backend_problems(RunOptions(Path("x.py"), *options), machine)
    assert words in problem


@pytest.mark.parametrize(
    ("options", "machine"),
    [
        (("single", 1, "bf16"), CPU),
        (("zero3", 2, "no"), CPU),
        (("fsdp", 1, "fp16"), GPUS),
        (("zero1", 4, "bf16"), GPUS),
    ],
)
def test_backend_that_can_run_here_is_not_refused(options: tuple[str, int, str], machine: Machine) -> None:
    assert backend_problems(RunOptions(Path("x.py"), *options), machine) == []


def test_dry_run_prints_the_line_only(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("run", recipe, "--backend", "ddp", "--processes", "2", "--dry-run", "optim.peak_lr=5e-4") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "accelerate launch --config_file " in line
    assert line.endswith(f"--num_processes 2 --mixed_precision no --main_process_port 0 {recipe} optim.peak_lr=5e-4")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run"], "RECIPE"),
        (["run", "x.py", "--mixed_precision", "bf16"], "--precision"),
        (["parity", "recipes/lora_sst2.py", "--processes", "two"], "--processes (two)"),
        (["parity", "recipes/lora_sst2.py", "--split", "4*4"], "--split (4*4)"),
        (["parity", "zzz.py", "--backends", "dpd"], "did you mean ddp?"),
        (["walk"], "walk"),
    ],
)
def test_wrong_options_exit_with_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*argv) == 2
    assert words in capsys.readouterr().err


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["run"], ["parity"], ["predict"], ["config", "schema"]):
        assert exit_code(*command, "--help") == 0
        assert "Example: samestep " + " ".join(command) in capsys.readouterr().out


def test_schema_is_written_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("config", "schema", "--out", tmp_path / "schema.json") == 0
    capsys.readouterr()
    assert exit_code("config", "schema", "--out", "-") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "schema.json").read_text())
    assert exit_code("config", "schema", "--out", tmp_path) == 2


def test_run_starts_what_it_prints(recipe: Path) -> None:
    result = run_for_real("run", recipe, "name=other")
    assert result.returncode == 0, result.stderr
    line, output = result.stdout.splitlines()
    assert line.startswith("accelerate launch --config_file accelerate_configs/single.yaml --num_processes 1 ")
    assert output == "rank None of other threads 1"


def test_mistake_leaves_no_traceback_behind(recipe: Path) -> None:
    result = run_for_real("run", recipe, "optim.peek_lr=1", "--backend", "fsdp")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: optim.peek_lr (1) on the command line: unknown setting; did you mean")
    assert len(result.stderr.splitlines()) == 1
