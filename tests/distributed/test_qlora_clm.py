"""QLoRA on a causal language model: the losses of one process on sharding backends, in fp32 and bf16, with NF4 and FP4."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resume_runs import start, train
from tests.rank_pool import run_ranks
from tests.tiny import tiny_llama, tiny_tokens
from trainer.config import ModelConfig, OptimConfig, QloraConfig, RunConfig, StreamData, TrainConfig
from trainer.model.export import load_exported

STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("qlora-clm")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama(folder / "model")))
    model.save_pretrained(folder / "model")
    for number, documents in enumerate((60, 20)):
        tiny_tokens(folder / f"tokens-{number}", documents, seed=number)
    return folder


def make_config(root: Path, run: Path, quantize: str) -> RunConfig:
    return RunConfig(
        name="qlora",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), task="clm"),
        method=QloraConfig(quantize=quantize, rank=4),  # type: ignore[arg-type]
        data=StreamData(
            sources=(str(root / "tokens-0"),),
            validation=str(root / "tokens-1"),
            sequence_length=32,
            max_epochs=4,
            cache=root / "cache",
        ),
        optim=OptimConfig(peak_lr=1e-2),
        train=TrainConfig(max_steps=STEPS, global_batch_size=4, save_every=STEPS, eval_every=STEPS, metric="loss"),
    )


_single: dict[str, list[float]] = {}


def losses_of_single(root: Path, quantize: str) -> list[float]:
    """In fp32; trained once for all tests."""
    if quantize not in _single:
        seen = start(make_config(root, root / f"single-{quantize}", quantize), "single", 1)
        assert seen is not None
        assert seen[0]["error"] is None
        _single[quantize] = list(seen[0]["losses"].values())
    return _single[quantize]


@pytest.mark.parametrize(
    ("backend", "precision", "quantize"),
    [
        ("fsdp", "no", "nf4"),
        ("zero3", "no", "fp4"),
        pytest.param("fsdp", "bf16", "fp4", marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", "nf4", marks=pytest.mark.slow),
    ],
)
def test_a_language_model_in_four_bits_learns_as_on_one_process(
    backend: str, precision: str, quantize: str, root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run", quantize)
    seen: list[dict[str, Any]] = run_ranks(train, backend, 2, args=(config,), precision=precision)
    assert [facts["error"] for facts in seen] == [None, None]
    expected = losses_of_single(root, quantize)
    summed = [sum(facts["losses"][step] for facts in seen) for step in range(STEPS)]
    assert summed == pytest.approx(expected, rel=1e-5 if precision == "no" else 1e-2)
    assert all(array.any() for array in seen[0]["weights"].values())  # the second factors start as zeros
    model = load_exported(config.folder / "model")[0]
    loaded = dict(model.named_parameters())
    for name, array in seen[0]["weights"].items():
        assert torch.equal(loaded[name], torch.from_numpy(array)), name
