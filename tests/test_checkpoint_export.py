"""`samestep checkpoint export`, `list`, `inspect`: plain libraries open what any backend's shards become, on one CPU process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from launch.cli import main
from tests.distributed.resume_runs import make_config, train
from tests.rank_pool import run_ranks
from tests.ruin import rehash, write_manifest
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.export import export_checkpoint
from trainer.checkpoint.manifest import MANIFEST, STATE, checksum, read_manifest
from trainer.checkpoint.store import describe_damage, list_checkpoints
from trainer.errors import CheckpointError

RUNS = [("zero3", "full"), ("fsdp", "lora"), ("zero2", "head"), ("ddp", "full")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


@pytest.fixture(scope="module", params=RUNS, ids=lambda pair: "-".join(pair))
def trained(request: pytest.FixtureRequest, root: Path) -> tuple[str, Path, dict[str, np.ndarray]]:
    """(method, run directory, weights of the last step as the engine gathered them)."""
    backend, method = request.param
    config = make_config(root, root / f"{backend}-{method}", method=method, max_steps=4)
    facts = run_ranks(train, backend, 2, args=(config,))[0]
    assert facts["error"] is None
    return method, config.folder, facts["weights"]


def test_plain_libraries_open_the_export_and_hold_the_trained_weights(
    trained: tuple[str, Path, dict[str, np.ndarray]], root: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    method, run, weights = trained
    export_checkpoint(list_checkpoints(run / "checkpoints")[0], tmp_path / "out")
    if method == "lora":
        plain = AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=2)
        model = PeftModel.from_pretrained(plain, tmp_path / "out")
    else:
        model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    found = dict(model.named_parameters())
    assert len(weights) > 1
    for name, weight in weights.items():
        assert np.array_equal(found[name].detach().numpy(), weight), name


def test_a_model_may_be_cut_into_shards_of_a_given_size(root: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = make_config(root, tmp_path / "run", max_steps=2)
    facts = run_ranks(train, "ddp", 2, args=(config,))[0]
    export_checkpoint(list_checkpoints(config.folder / "checkpoints")[0], tmp_path / "out", shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    for file in files:
        tensors = safe_open(file, "pt")
        sizes = [tensors.get_tensor(key).nbytes for key in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.classifier.weight.detach(), torch.from_numpy(facts["weights"]["classifier.weight"]))


def test_an_adapters_checkpoint_holds_nothing_of_the_base_and_little_else(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", method="lora", max_steps=2)
    config = config.model_copy(update={"model": config.model.model_copy(update={"source": "asset:minilm"})})
    facts = run_ranks(train, "fsdp", 2, args=(config,))[0]  # on a base of 90 MB
    newest = list_checkpoints(config.folder / "checkpoints")[0]
    manifest = read_manifest(newest)
    names = {key.partition("/")[2] for key in manifest.tensors}
    assert names == set(facts["weights"])
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    trainable = sum(weight.nbytes for weight in facts["weights"].values())
    size = sum(path.stat().st_size for path in newest.iterdir())
    assert 3 * trainable < size <= 1.2 * 3 * trainable + 1_000_000


MEASURE_EXPORT = """
import sys, threading, time
from pathlib import Path
from trainer.checkpoint.export import export_checkpoint

def anonymous():  # what this process holds itself; pages of files that it maps are the kernel's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

small, large, target = map(Path, sys.argv[1:])
export_checkpoint(small, target / "small")  # everything is imported now
before, peak, ended = anonymous(), [0], threading.Event()
def look():
    while not ended.wait(0.002):
        peak.append(anonymous())
thread = threading.Thread(target=look)
thread.start()
export_checkpoint(large, target / "large", shard_bytes=4_000_000)
ended.set()
thread.join()
print(max(peak) - before)
"""


def test_an_export_holds_one_shard_in_memory_at_a_time(root: Path, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "model", hidden_size=768)
    (tmp_path / "data.csv").symlink_to(root / "data.csv")
    checkpoints = []
    for where in (root, tmp_path):
        config = make_config(where, tmp_path / f"run-{len(checkpoints)}", max_steps=1)
        run_ranks(train, "single", 1, args=(config,))
        checkpoints.append(list_checkpoints(config.folder / "checkpoints")[0])
    words = [sys.executable, "-c", MEASURE_EXPORT, *map(str, checkpoints), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert whole > 35_000_000
    assert int(done.stdout.splitlines()[-1]) < whole  # all of it, and the bytes to be written, would take twice as much


def test_the_commands_work_without_importing_torch(trained: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    code = (
        "import sys; from launch.cli import app\n"
        "for words in (['list'], ['inspect'], ['verify']):\n"
        f"    app(['checkpoint', *words, {str(trained[1])!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step-00000004" in done.stdout
    assert ": whole" in done.stdout
    assert "weight/" in done.stdout


def test_mistakes_exit_with_2_and_say_what_to_do(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(root, tmp_path / "run", method="head", max_steps=2)
    run_ranks(train, "single", 1, args=(config,))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    for words, message in (
        (["list", str(tmp_path / "nothing")], "does not exist; give a run directory"),
        (["inspect", str(tmp_path / "full")], "is neither a checkpoint nor a run directory"),
        (["export", str(config.folder), "--output", str(tmp_path / "full")], "exists already"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_settings_that_this_version_lacks_and_code_of_a_repository_are_refused_by_name(
    root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run", max_steps=2)
    run_ranks(train, "single", 1, args=(config,))
    checkpoint = list_checkpoints(config.folder / "checkpoints")[0]
    state = json.loads((checkpoint / STATE).read_text())
    state["config"]["model"]["trust_remote_code"] = True
    write_state(checkpoint, state)
    with pytest.raises(CheckpointError, match=r"model.trust_remote_code=true, on .*give --trust-remote-code"):
        export_checkpoint(checkpoint, tmp_path / "out")
    export_checkpoint(checkpoint, tmp_path / "out", trust_remote_code=True)
    state["config"]["optim"]["momentum"] = 0.9
    write_state(checkpoint, state)
    with pytest.raises(CheckpointError, match=r"its setting optim.momentum is not one of this version .*samestep 0\."):
        export_checkpoint(checkpoint, tmp_path / "other", trust_remote_code=True)
    state["config"]["optim"]["momentum"] = 0.8
    write_state(checkpoint, state, config_hash=False)
    assert describe_damage(checkpoint) is None
    with pytest.raises(CheckpointError, match="its settings are not those that"):
        export_checkpoint(checkpoint, tmp_path / "other")


def write_state(folder: Path, state: dict[str, Any], *, config_hash: bool = True) -> None:
    """Another state.json, with hashes as if the checkpoint had been written so."""
    (folder / STATE).write_text(json.dumps(state))
    content = json.loads((folder / MANIFEST).read_text())
    if config_hash:
        content["config_hash"] = checksum(state["config"])
    write_manifest(folder, content, forge=True)
    rehash(folder, STATE)


def change_base(folder: Path) -> None:
    """Other weights in the same shapes."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def test_a_full_disk_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(root, tmp_path / "run", method="full", max_steps=1)
    run_ranks(train, "single", 1, args=(config,))

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trainer.checkpoint.export.save_file", full)
    with pytest.raises(
        CheckpointError, match=r"--output \(.*out\) cannot be written \(.*No space left.*; give a folder with"
    ):
        export_checkpoint(list_checkpoints(config.folder / "checkpoints")[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_adapter_on_another_base_is_refused_and_a_whole_model_needs_none(
    method: str, root: Path, tmp_path: Path
) -> None:
    from trainer.errors import SamestepError

    other = tmp_path / "other"
    shutil.copytree(root / "model", other)
    config = make_config(root, tmp_path / "run", method=method, max_steps=2)
    config = config.model_copy(update={"model": config.model.model_copy(update={"source": str(other)})})
    run_ranks(train, "single", 1, args=(config,))
    change_base(other)
    checkpoint = list_checkpoints(config.folder / "checkpoints")[0]
    if method == "full":
        export_checkpoint(checkpoint, tmp_path / "out")
        return
    with pytest.raises(SamestepError, match="was trained on other weights than"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
