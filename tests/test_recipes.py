"""The recipes as people run them: the bare launch line on a fresh machine, their shape, and their configs."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import RunConfig
from trainer.data.assets import put_asset

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
BACKEND_WORDS = re.compile(r"fsdp|deepspeed|zero|ddp|gloo", re.IGNORECASE)
NUM_SENTENCES, TEST_SENTENCES = 200, 30
RUN = Path("runs/lora_sst2")


def test_the_globs_found_what_there_is() -> None:
    assert [path.name for path in RECIPES] == [
        "full_sst2.py",
        "head_sst2.py",
        "lora_sst2.py",
        "ner.py",
        "pretrain_bart.py",
        "pretrain_clm.py",
        "pretrain_mlm.py",
        "pretrain_t5.py",
        "pretrain_xlnet.py",
        "qa.py",
        "qlora_instruct.py",
        "sft_full.py",
        "sft_smollm2.py",
        "summarize.py",
    ]
    assert [path.name for path in CONFIGS] == ["full_sst2_hub.yaml", "lora_sst2_hub.yaml", "pretrain_clm_hub.yaml"]


# The bare launch line


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMESTEP_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def fresh_machine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A working folder with nothing but recipes/, and an environment with an empty home and small assets in the cache."""
    machine = tmp_path_factory.mktemp("machine")
    work, home, cache = machine / "work", machine / "home", machine / "cache"
    for folder in (work, home, machine / "sst"):
        folder.mkdir()
    (work / "recipes").symlink_to(ROOT / "recipes")
    tiny_sentences(machine / "sst" / "sst.tsv", rows=NUM_SENTENCES)
    with cache_in(cache):
        put_asset("minilm", tiny_bert(machine / "bert"))
        put_asset("sst", machine / "sst")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"ACCELERATE|FSDP|HF_|XDG_|RANK|WORLD_SIZE|LOCAL_|MASTER_|TORCH|PYTHONWARNINGS|OMP_", name)
    }
    scripts = str(Path(sys.executable).parent)
    environment = kept | {"HOME": str(home), "SAMESTEP_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return work, environment | {"PATH": scripts + os.pathsep + kept["PATH"]}


def in_machine(machine: tuple[Path, dict[str, str]], *argv: str) -> subprocess.CompletedProcess[str]:
    work, environment = machine
    return subprocess.run(argv, cwd=work, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def launched(fresh_machine: tuple[Path, dict[str, str]]) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run directory, and what the command said."""
    done = in_machine(fresh_machine, "accelerate", "launch", "recipes/lora_sst2.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return fresh_machine[0] / RUN, done


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_bare_launch_line_leaves_a_whole_run(
    launched: tuple[Path, subprocess.CompletedProcess[str]], fresh_machine: tuple[Path, dict[str, str]]
) -> None:
    run, done = launched
    assert {path.name for path in run.parent.iterdir()} == {run.name, f".{run.name}.lock"}
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "log.txt", "metrics.jsonl", "tensorboard", "curves.png", "confusion.png", "summary.md"),
        *("model", "checkpoints", "outcome.json"),
    }
    assert all(path.stat().st_size > 0 for path in run.rglob("*"))
    for picture in ("curves.png", "confusion.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "samestep.json"} <= {
        path.name for path in (run / "model").iterdir()
    }
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert RunConfig(**config).name == "lora_sst2"
    assert f"run directory: {RUN}" in done.stdout


def test_the_last_line_of_the_metrics_is_the_test_of_the_exported_model(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    *_, last = metrics_of(launched[0])
    assert last["test/count"] == TEST_SENTENCES
    assert 0 <= last["test/accuracy"] <= 1
    said = (launched[0] / "summary.md").read_text(encoding="utf-8")
    assert f"| test accuracy | {last['test/accuracy']:.4f} |" in said
    assert f"accuracy {last['test/accuracy']:.4f}" in launched[1].stdout


def test_tensorboard_holds_the_numbers_of_the_metrics(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(launched[0] / "tensorboard"))
    events.Reload()
    expected: dict[str, list[tuple[float, float]]] = {}
    for line in metrics_of(launched[0]):
        for name, value in line.items():
            if name != "step":
                expected.setdefault(name, []).append((line["step"], value))
    assert set(events.Tags()["scalars"]) == set(expected)
    assert {"train/loss", "train/lr", "eval/accuracy", "test/accuracy", "samples_per_s"} <= set(expected)
    for name, points in expected.items():
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in read] == [step for step, _ in points]
        assert [value for _, value in read] == pytest.approx([value for _, value in points], rel=1e-6)


LAUNCHER = re.compile(
    r"The following values were not passed to `accelerate launch`|`--\w+` was set to a value of|"
    r"To avoid this warning pass in values|\s+More than one GPU was found|\s+If this was not intended"
)


def test_the_screen_is_free_of_library_chatter(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    done = launched[1]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if not LAUNCHER.search(line)]
    chatter = re.compile(r"WARN|Warning|deprecat|Traceback|\[rank|kernels|it/s\]|INFO", re.IGNORECASE)
    assert [line for line in lines if chatter.search(line)] == []
    assert done.stderr.strip() == "" or all(LAUNCHER.search(line) for line in done.stderr.splitlines() if line.strip())
    for wanted in ("backend    single, 1 process, fp32, cpu", "step ", "validation loss", "test (30 examples"):
        assert wanted in done.stdout


def test_what_was_said_is_in_the_log(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, done = launched
    log = (run / "log.txt").read_text(encoding="utf-8")
    starts = ("data ", "batches ", "tokens ", "backend ", "step ", "test (", "trained ", "run directory")
    said = [line.strip() for line in done.stdout.splitlines() if line.startswith(starts)]
    assert {start for start in starts if any(line.startswith(start.strip()) for line in said)} == set(starts)
    assert [line for line in said if line not in log] == []


def test_predict_reads_the_run(
    launched: tuple[Path, subprocess.CompletedProcess[str]], fresh_machine: tuple[Path, dict[str, str]]
) -> None:
    done = in_machine(fresh_machine, "samestep", "predict", str(RUN), "a good film")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b(positive|negative)\b", done.stdout)
    assert re.search(r"[01]\.\d+|\d+(\.\d+)?%", done.stdout)
    assert re.fullmatch(r"1 text in .* a second\n", done.stderr)


def test_the_same_line_again_says_that_the_run_is_finished_and_ends_with_code_0(
    launched: tuple[Path, subprocess.CompletedProcess[str]], fresh_machine: tuple[Path, dict[str, str]]
) -> None:
    done = in_machine(fresh_machine, "accelerate", "launch", "recipes/lora_sst2.py")
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert "train.extend=true" in done.stdout


# Shape


def docstring_free(source: str) -> str:
    """The code without the module's docstring, which names launch lines."""
    tree = ast.parse(source)
    end = tree.body[0].end_lineno
    return "\n".join(source.splitlines()[end:])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_short_and_flat(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) <= 45
    assert "accelerate launch recipes/" in (ast.get_docstring(tree) or "")
    functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert functions == ["main"]
    assert [
        n.id for node in tree.body if isinstance(node, ast.Assign) for n in node.targets if isinstance(n, ast.Name)
    ] == ["DEFAULTS"]
    branches = [
        node for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.Match | ast.Try | ast.While)
    ]
    assert branches == [tree.body[-1]]
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run_recipe(main, DEFAULTS)"
    assert BACKEND_WORDS.findall(docstring_free(source)) == []


# Configs


def launch_line(path: Path) -> list[str]:
    """The words of the `accelerate launch` line in a YAML's header."""
    text = path.read_text(encoding="utf-8")
    lines = [line.lstrip("# ") for line in text.splitlines() if re.match(r"#\s+accelerate launch ", line)]
    assert lines, f"{path}: the header must hold its launch line"
    return shlex.split(lines[0])


@pytest.fixture(scope="module")
def printed_configs(fresh_machine: tuple[Path, dict[str, str]]) -> dict[Path, str]:
    """What the launch line of each config's header prints with --print-config; all of them run at once."""
    work, env = fresh_machine
    running = {
        path: subprocess.Popen(
            [*launch_line(path), "--print-config"], cwd=work, env=env, stdout=subprocess.PIPE, text=True
        )
        for path in CONFIGS
    }
    printed = {path: process.communicate(timeout=240)[0] for path, process in running.items()}
    assert {process.returncode for process in running.values()} == {0}
    return printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_resolves_by_the_launch_line_of_its_header(path: Path, printed_configs: dict[Path, str]) -> None:
    program, verb, _, *arguments = launch_line(path)
    assert (program, verb) == ("accelerate", "launch")
    assert arguments == ["--config", path.relative_to(ROOT).as_posix()]
    printed = printed_configs[path]
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    resolved = RunConfig(**yaml.safe_load(printed))
    assert resolved.name == written["name"] == path.stem
    assert f"# {path.relative_to(ROOT).as_posix()}" in printed  # the source of each value
    for section, values in written.items():
        if isinstance(values, dict):
            found = getattr(resolved, section).model_dump(mode="json")
            assert {key: found[key] for key in values} == values, section


def test_the_hub_configs_are_bert_on_sst2_with_its_own_validation_split() -> None:
    for path in (path for path in CONFIGS if "sst2" in path.name):
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert written["model"]["source"] == "google-bert/bert-base-uncased"
        assert (written["data"]["text"], written["data"]["validation"]) == ("sentence", "validation")
