"""`samestep data`: what the commands print, their exit codes, and that none of them imports torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from launch.cli import main
from tests.tiny import tiny_llama, tiny_tokens
from trainer.config import ModelConfig, RunConfig, StreamData, TrainConfig
from trainer.data.stream.open import open_streams


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes as tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<end>": 256}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<end>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def run(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", *words])
    assert ended.value.code == code


def test_text_becomes_a_dataset_that_is_described_and_verified(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.txt").write_text("a longer text")
    out = tmp_path / "out"
    run(
        "tokenize",
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.txt"),
        "--output",
        str(out),
        "--tokenizer",
        str(tokenizer),
        "--eos",
        "<end>",
    )
    run("stats", str(out), "--sequence-length", "16")
    run("verify", str(out))
    printed = capsys.readouterr().out
    assert "20 tokens in 2 documents, 1 shard(s) of uint16, dataset id " in printed
    assert "best_fit: 2 rows of 16, 37.500% padding, 0 tokens left over" in printed
    assert "shard-00000.bin: whole" in printed
    shard = out / "shard-00000.bin"
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    run("verify", str(out), code=3)
    assert "shard-00000.bin: DAMAGED: " in capsys.readouterr().out


def test_foreign_files_are_adopted(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.array([1, 2, 256, 3, 256], "<u2").tofile(tmp_path / "train.bin")
    run("adopt", str(tmp_path), "--tokenizer", str(tokenizer), "--eos", "<end>")
    assert "5 tokens in 2 documents" in capsys.readouterr().out
    run("verify", str(tmp_path))
    run("adopt", str(tmp_path), "--tokenizer", str(tokenizer), code=2)
    assert "is a token dataset already" in capsys.readouterr().err


def test_a_tokenizer_that_lies_beside_foreign_files_is_not_replaced_by_another(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.array([1, 2, 256, 3, 256], "<u2").tofile(tmp_path / "train.bin")
    own = tmp_path / "tokenizer.json"
    own.write_text('{"of": "these tokens"}')
    run("adopt", str(tmp_path), "--tokenizer", str(tokenizer), "--eos", "<end>", code=2)
    assert f"{own} is another tokenizer than --tokenizer ({tokenizer})" in capsys.readouterr().err
    assert own.read_text() == '{"of": "these tokens"}'
    assert not (tmp_path / "manifest.json").exists()
    own.write_bytes((tokenizer / "tokenizer.json").read_bytes())
    run("adopt", str(tmp_path), "--tokenizer", str(own), "--eos", "<end>")


def test_mistakes_exit_with_2(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    for words, message in (
        (
            ["tokenize", str(tmp_path / "none.txt"), "--output", str(tmp_path / "o"), "--tokenizer", str(tokenizer)],
            "there is no such file",
        ),
        (
            ["tokenize", str(tmp_path / "bad.txt"), "--output", str(tmp_path / "o"), "--tokenizer", str(tokenizer)],
            "byte 0 is not UTF-8",
        ),
        (
            ["tokenize", str(tmp_path / "bad.txt"), "--output", str(tmp_path / "o"), "--tokenizer", "nowhere"],
            "give a tokenizer.json",
        ),
        (
            [
                "tokenize",
                str(tmp_path / "bad.txt"),
                "--output",
                str(tmp_path / "o"),
                "--tokenizer",
                str(tokenizer),
                "--split",
                "test",
            ],
            "choose from a hub dataset, and no INPUT is one",
        ),
        (["stats", str(tmp_path)], "is no token dataset"),
        (["adopt", str(tmp_path), "--tokenizer", str(tokenizer)], "has no .ds and no .bin file"),
    ):
        run(*words, code=2)
        assert message in capsys.readouterr().err


def test_the_commands_import_no_torch(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    words = [
        "data",
        "tokenize",
        str(tmp_path / "a.txt"),
        "--output",
        str(tmp_path / "o"),
        "--tokenizer",
        str(tokenizer),
    ]
    code = f"import sys; from launch.cli import app; app({words!r}, standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def tiny_settings(root: Path) -> list[str]:
    """Settings that make recipes/pretrain_clm.py read a dataset of a few documents."""
    tiny_llama(root / "model")
    tiny_tokens(root / "tokens", documents=60)
    return [
        f"data.sources={root / 'tokens'}",
        f"data.validation={root / 'tokens'}",
        f"data.cache={root / 'cache'}",
        f"model.source={root / 'model'}",
        "data.sequence_length=48",
        "train.global_batch_size=4",
        "train.max_steps=3",
    ]


def test_show_prints_a_samples_place_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings(tmp_path)
    run("show", "recipes/pretrain_clm.py", "6", *settings)
    printed = capsys.readouterr().out
    assert "sample 6 of pretrain_clm: in step 2, place 2 of 4" in printed
    assert f"source 0 ({tmp_path / 'tokens'}), pass 1, shard shard-" in printed
    config = RunConfig(
        name="show",
        model=ModelConfig(source="x", task="clm"),
        data=StreamData(sources=(str(tmp_path / "tokens"),), validation=str(tmp_path / "tokens"), sequence_length=48),
        train=TrainConfig(max_steps=3, global_batch_size=4, metric="loss"),
    )
    streams = open_streams(config)
    row = streams.train.batch([6], document_ids=True)
    held = row["input_ids"][0][row["document_ids"][0] >= 0]
    shown = [word for line in printed.splitlines()[2:] if not line.startswith("---") for word in line.split()]
    assert shown == [f"w{token}" if token < 60 else "<end>" for token in held]


def test_bench_reads_and_says_how_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("bench", "recipes/pretrain_clm.py", *tiny_settings(tmp_path), "--seconds", "0.2")
    assert re.search(r"[\d,]+ rows of 48 in 0\.\d\d s: [\d,]+ rows/s, [\d,]+ tokens/s", capsys.readouterr().out)


def test_a_later_weight_that_is_no_number_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, *others = tiny_settings(tmp_path)
    words = [f"data.sources={tmp_path / 'tokens'},{tmp_path / 'tokens'}", "data.weights=1,1"]
    run("show", "recipes/pretrain_clm.py", "0", *others, *words, "data.later_weights=10:nan/1", code=2)
    assert "data.weights ((nan, 1.0)): one weight of 0 or more for each source" in capsys.readouterr().err


def test_show_of_a_recipe_without_token_datasets_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    run("show", "recipes/lora_sst2.py", "0", code=2)
    assert "has data.kind=classification, and no token datasets" in capsys.readouterr().err
