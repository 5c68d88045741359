"""`samestep data tokenize asset:stdlib` by two workers, killed at a random moment and run again: what one worker makes undisturbed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from trainer.data.stream.shards import read_manifest, verify_dataset

CALL = [sys.executable, "-c", "from launch.cli import main; main()", "data", "tokenize", "asset:stdlib"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_standard_library_killed_and_run_again_is_the_same_dataset(tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<end>": 256}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    options = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--eos", "<end>"]

    def start(name: str, workers: int) -> subprocess.Popen[bytes]:
        command = [*CALL, *options, "--output", str(tmp_path / name), "--workers", str(workers)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("whole", 1).wait() == 0
    elapsed_s = time.monotonic() - began
    wanted = read_manifest(tmp_path / "whole").dataset_id
    killed = start("killed", 2)
    time.sleep(random.uniform(0.1, 0.9) * elapsed_s / 2)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert start("killed", 2).wait() == 0
    assert read_manifest(tmp_path / "killed").dataset_id == wanted
    assert all(damage is None for _, damage in verify_dataset(tmp_path / "whole"))
