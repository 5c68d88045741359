"""Adapters that are damaged, lack a setting, or lie on another base: every command says so, with exit code 2 and no traceback."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.exported_runs import ADAPTER, change_base, change_json, command
from tests.test_predict import export_run
from tests.tiny import tiny_bert
from trainer.errors import CheckpointError
from trainer.model.adapters import find_adapter, merged
from trainer.model.export import load_exported
from trainer.predict.adapters import AdapterPredictor


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and the runs lora and qlora on it, to be copied."""
    folder = tmp_path_factory.mktemp("exported")
    tiny_bert(folder / "base", hidden_size=64)
    for method in ("lora", "qlora"):
        export_run(folder / method, folder / "base", method)
    return folder


@pytest.fixture
def root(exported: Path, tmp_path: Path) -> Path:
    """A copy of them, whose base may be changed."""
    for name in ("base", "lora", "qlora"):
        shutil.copytree(exported / name, tmp_path / name)
    for name in ("lora", "qlora"):
        change_json(tmp_path / name / "model" / "samestep.json", base=str(tmp_path / "base"))
    return tmp_path


def commands(run: Path) -> list[tuple[object, ...]]:
    """Those that load an adapter."""
    return [
        ("adapter", "merge", run, "--output", run / "out"),
        ("adapter", "compare", run),
        ("predict", "--adapters", run, "a good film"),
        ("predict", run, "a good film"),
    ]


@pytest.mark.parametrize(("method", "word"), [("lora", ""), ("qlora", "intermediate.dense.weight")])
def test_a_base_that_was_replaced_is_found_by_every_command(
    method: str, word: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """qlora: the tensors that changed are among the quantized ones, as when an adapter was merged into the base."""
    assert command("predict", "--adapters", root / method, "a good film") == 0
    change_base(root / "base", word)
    ways = commands(root / method)
    if method == "qlora":
        ways.append((*ways[0], "--into", "base"))
    for argv in ways:
        capsys.readouterr()
        assert command(*argv) == 2, argv
        assert "was trained on other weights than" in capsys.readouterr().err
    assert not (root / method / "out").exists()


def test_the_files_of_a_base_are_the_same_in_one_file_and_in_shards(root: Path) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(root / "base")
    (root / "base" / "model.safetensors").unlink()
    model.save_pretrained(root / "base", max_shard_size="50KB")
    assert len(list((root / "base").glob("model-*.safetensors"))) > 2
    load_exported(root / "qlora" / "model")


def test_a_base_of_another_width_is_found_by_every_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bert(root / "base", hidden_size=32)
    for argv in commands(root / "lora"):
        capsys.readouterr()
        assert command(*argv) == 2, argv
        assert "does not open" in capsys.readouterr().err


def test_a_truncated_adapter_is_found_by_every_command_and_does_not_hide_the_others(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = root / "lora" / "model" / ADAPTER
    file.write_bytes(file.read_bytes()[:-100])
    for argv in (*commands(root / "lora"), ("adapter", "inspect", root / "lora")):
        capsys.readouterr()
        assert command(*argv) == 2, argv
        assert "does not open" in capsys.readouterr().err
    assert command("adapter", "list", root) == 0
    shown = capsys.readouterr()
    assert "qlora" in shown.out
    assert "lora: left out: " in shown.err


def test_a_part_that_is_missing_is_found(root: Path) -> None:
    file = root / "lora" / "model" / ADAPTER
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file, {"format": "pt"})
    for open_it in (
        lambda: merged(*find_adapter(root / "lora"), "base"),
        lambda: AdapterPredictor({"lora": root / "lora"}),
        lambda: load_exported(root / "lora" / "model"),
    ):
        with pytest.raises(CheckpointError, match="lack a part of the adapter"):
            open_it()


@pytest.mark.parametrize("name", ["lora_alpha", "r"])
def test_an_adapter_without_its_scale_is_refused(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_json(root / "lora" / "model" / "adapter_config.json", **{name: None})
    for argv in commands(root / "lora"):
        capsys.readouterr()
        assert command(*argv) == 2, argv
        assert f"adapter_config.json lacks {name}, which scale" in capsys.readouterr().err


def test_outputs_that_are_no_distribution_are_not_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("question_answering", "seq2seq"):
        change_json(root / "lora" / "model" / "samestep.json", task=task)
        assert command("adapter", "compare", root / "lora") == 2
        assert f"is of task {task}, and compare takes" in capsys.readouterr().err


def test_options_without_effect_are_refused_with_several_adapters(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = root / "text.txt"
    text.write_text("a film")
    for options, words in (
        (("--task", "clm"), "--task: has no effect"),
        (("--chat", "--context", text), "--chat, --context: has no effect"),
        (("--new-tokens", "3", "--seed", "1"), "--new-tokens, --seed: has no effect on"),
    ):
        assert command("predict", "--adapters", root / "lora", "a good film", *options) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("./nowhere",), "there is no such folder"),
        (("BASE", "--targets", "qeury"), "did you mean query?"),
        (("BASE", "--targets", ","), "names no layer"),
        (("BASE", "--rank", "65"), "method.rank (65) must be at most 64"),
    ],
)
def test_methods_says_what_does_not_fit(
    argv: tuple[str, ...], words: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chart = tmp_path / "chart.png"
    assert (
        command("methods", *(str(exported / "base") if word == "BASE" else word for word in argv), "--chart", chart)
        == 2
    )
    assert words in capsys.readouterr().err
    assert not chart.exists()
