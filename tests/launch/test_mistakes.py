"""Users' mistakes under plain `accelerate launch`: found before a model loads, all together, said once, exit code 2."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.preflight import load_recipe
from tests.rank_pool import BACKEND_ENV, FSDP, run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.resolve import run_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "lora_sst2.py"
OLD_FSDP = FSDP | {"FSDP_VERSION": "1"}
ON_CPU = {"LOCAL_RANK": "0", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
ON_DISK = {"LOCAL_RANK": "0", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}
Case = tuple[list[str], dict[str, str], str]
CASES: dict[str, Case] = {
    "misspelt key": (["optim.peek_lr=1"], {}, "optim.peek_lr (1) on the command line: unknown setting; did you mean"),
    "wrong type": (["train.seed=x"], {}, "train.seed (x) on the command line: must be a whole number"),
    "backend that cannot run here": ([], OLD_FSDP, "fsdp_config.fsdp_version (1) must be 2"),
    "missing file": (["data.source=nothing.csv"], {}, "data.source (nothing.csv)"),
    "missing column": (["data.text=sentence"], {}, "data.text (sentence)"),
    "label outside the label set": (["data.labels=negative,neutral"], {}, "unknown label"),
    "fewer samples than ranks": (["train.global_batch_size=2"], {"WORLD_SIZE": "4"}, "train.global_batch_size (2)"),
    "unknown LoRA target": (["method.targets=qwery"], {}, "query"),
    "setting of the accelerate configuration": (["--config", "own.yaml"], {}, "mixed_precision (bf16) in own.yaml"),
    **{
        f"{name} without ranks": (
            [],
            BACKEND_ENV[name] | {"WORLD_SIZE": "2"},
            f"asked for {name} with 2 process(es), but ",
        )
        for name in ("single", "fsdp", "zero1", "zero2", "zero3")
    },
    **{
        f"{name} without its stage": (
            [],
            BACKEND_ENV[name] | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "zero_stage (0) must be 1, 2",
        )
        for name in ("zero1", "zero2", "zero3")
    },
    "zero1 on another device": (
        [],
        BACKEND_ENV["zero1"] | ON_CPU,
        "needs deepspeed_config.zero_stage 2 or 3, and it is 1",
    ),
    "zero3 on another device": ([], BACKEND_ENV["zero3"] | ON_DISK, "offload_param_device (nvme) is not supported"),
    "precision of no backend": (
        [],
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        "mixed precision (fp8) must be one of no, bf16",
    ),
    "another library": (
        [],
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
        "asks for Megatron-LM, which samestep does not run",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences, a YAML with a mistake, and a model whose weights cannot be read."""
    made = tmp_path_factory.mktemp("mistakes")
    (tiny_bert(made / "bert") / "model.safetensors").write_bytes(b"no weights")
    tiny_sentences(made / "sentences.csv")
    (made / "own.yaml").write_text("mixed_precision: bf16\n")
    return made


def sources(folder: Path) -> list[str]:
    """Without those a test sets itself."""
    return [f"model.source={folder / 'bert'}", f"data.source={folder / 'sentences.csv'}"]


def make_mistakes(folder: Path) -> dict[str, tuple[object, str]]:
    """Exit code and message of the recipe's own entry point, by case; runs in a process of its own."""
    os.chdir(folder)
    recipe, found = load_recipe(RECIPE), {}
    for name, (arguments, environment, _) in CASES.items():
        said, code, before = io.StringIO(), None, dict(os.environ)
        os.environ.update(environment)
        given = [
            word for word in sources(folder) if word.partition("=")[0] not in {a.partition("=")[0] for a in arguments}
        ]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                run_recipe(recipe.main, recipe.DEFAULTS, [*given, *arguments])
        except SystemExit as end:
            code = end.code
        os.environ.clear()
        os.environ.update(before)
        found[name] = (code, said.getvalue())
    return found


def test_each_mistake_ends_with_code_2_and_one_message_before_a_model_loads(folder: Path) -> None:
    (found,) = run_ranks(make_mistakes, "single", 1, args=(folder,))
    assert found.keys() == CASES.keys()
    for name, (code, said) in found.items():
        assert code == 2, (name, said)
        assert said.startswith("error: ") and said.count("error: ") == 1, (name, said)
        assert CASES[name][2] in said, (name, said)


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes, as a user starts them."""
    argv = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs/ddp.yaml"),
    ]
    return subprocess.run(
        [*argv, "--num_processes", "2", "--main_process_port", "0", str(RECIPE), *sources(folder), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "count", "words"),
    [
        (
            *(["optim.peek_lr=1", "train.seed=x", "train.global_batch_size=1", "--config", "own.yaml"], 4),
            ["optim.peek_lr (1)", "train.seed (x)", "train.global_batch_size (1)", "mixed_precision (bf16)"],
        ),
        (["data.labels=negative,neutral", "method.targets=qwery"], 2, ["unknown label", "method.targets (qwery)"]),
    ],
    ids=["found in the settings", "found by the builders"],
)
def test_mistakes_on_two_ranks_are_said_once_and_together(
    folder: Path, arguments: list[str], count: int, words: list[str]
) -> None:
    done = launch(folder, *arguments)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {count} problems\n") == 1, done.stderr
    assert [word for word in words if done.stderr.count(word) != 1] == [], done.stderr
    assert "exitcode  : 2" in done.stderr  # the launcher's own report
    assert f'File "{ROOT}/recipes' not in done.stderr and f'File "{ROOT}/trainer' not in done.stderr
