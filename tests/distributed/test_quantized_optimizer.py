"""bitsandbytes' optimizers: resumed bit for bit where they run, refused where they cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resume_runs import make_config, same_weights, start
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.manifest import read_manifest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    tiny_bert(folder / "model", hidden_size=128)  # matrices of more than 4,096 elements, below which moments stay fp32
    tiny_sentences(folder / "data.csv", rows=96)
    return folder


def config_of(root: Path, run: Path, name: str) -> Any:
    plain = make_config(root, run, max_steps=6, save_every=3, eval_every=6)
    return plain.model_copy(update={"optim": plain.optim.model_copy(update={"name": name, "peak_lr": 1e-3})})


@pytest.mark.parametrize(("backend", "ranks"), [("single", 1), ("ddp", 2)])
def test_8_bit_moments_resume_bit_for_bit(backend: str, ranks: int, root: Path, tmp_path: Path) -> None:
    whole = start(config_of(root, tmp_path / "whole", "adamw_8bit"), backend, ranks)
    assert whole is not None
    assert whole[0]["error"] is None
    config = config_of(root, tmp_path / "again", "adamw_8bit")
    assert start(config, backend, ranks, fault=f"step@{ranks - 1}:3:usr1") is not None
    resumed = start(config, backend, ranks)
    assert resumed is not None
    assert sorted(resumed[0]["losses"]) == [3, 4, 5]
    assert all(same_weights(one, other) for one, other in zip(resumed, whole, strict=True))
    (folder,) = (tmp_path / "again" / "checkpoints").glob("step-00000006")
    manifest = read_manifest(folder)
    matrix = "bert.encoder.layer.0.intermediate.dense.weight"
    assert manifest.tensors[f"state1/{matrix}"] == [256, 128]
    assert manifest.tensors[f"absmax1/{matrix}"] == [256 * 128 // 256]
    sizes = {
        kind: sum(e.size for n, e in manifest.files.items() if n.startswith(kind)) for kind in ("weights", "optimizer")
    }
    assert sizes["optimizer"] < 0.7 * sizes["weights"]  # fp32 moments would take twice the weights


@pytest.mark.parametrize(
    ("name", "backend", "words"),
    [("adamw_8bit", backend, f"which {backend} shards") for backend in ("fsdp", "zero1", "zero2", "zero3")]
    + [("paged_adamw", "single", "this run has no GPU"), ("paged_adamw_8bit", "ddp", "this run has no GPU")],
)
def test_an_optimizer_that_cannot_run_here_is_refused_before_anything_loads(
    name: str, backend: str, words: str, root: Path, tmp_path: Path
) -> None:
    seen = start(config_of(root, tmp_path / "run", name), backend, 1 if backend == "single" else 2)
    assert seen is not None
    assert all(
        facts["error"].startswith(f"ConfigError: optim.name ({name})") and words in facts["error"] for facts in seen
    )
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_optimizer_is_refused(root: Path, tmp_path: Path) -> None:
    assert start(config_of(root, tmp_path / "run", "adamw"), "single", 1, fault="step@0:4:usr1") is not None
    seen = start(config_of(root, tmp_path / "run", "adamw_8bit"), "single", 1)
    assert seen is not None
    assert "optim.name" in seen[0]["error"]


@pytest.mark.parametrize("saved_by", [("single", 1), ("ddp", 2)])
def test_8_bit_moments_are_refused_on_another_topology(saved_by: tuple[str, int], root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "run", "adamw_8bit")
    assert start(config, *saved_by, fault=f"step@{saved_by[1] - 1}:2:usr1") is not None
    seen = start(config, "ddp", 3)
    assert seen is not None
    words = f"go on only on {saved_by[0]} with {saved_by[1]} process(es), which saved them, not on ddp with 3"
    assert all(facts["error"].startswith("CheckpointError: ") and words in facts["error"] for facts in seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged optimizers move moments between a GPU and the host")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_moments_resume_bit_for_bit(name: str, root: Path, tmp_path: Path) -> None:
    whole = start(config_of(root, tmp_path / "whole", name), "single", 1)
    config = config_of(root, tmp_path / "again", name)
    assert start(config, "single", 1, fault="step@0:3:usr1") is not None
    resumed = start(config, "single", 1)
    assert whole is not None
    assert resumed is not None
    assert [seen[0]["error"] for seen in (whole, resumed)] == [None, None]
    assert same_weights(resumed[0], whole[0])
