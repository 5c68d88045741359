"""The proof that what was asked for is what runs: each check is shown something else, made by the libraries themselves."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.rank_pool import BACKENDS, run_ranks
from trainer.backend import build_accelerator, build_engine
from trainer.backend.build import verify_accelerator
from trainer.backend.request import Request, read_request
from trainer.backend.wrap import COMPUTE_DTYPES, verify_precision, verify_wrapper
from trainer.config import RunConfig, TrainConfig
from trainer.errors import BackendError


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))


def refusals() -> dict[str, str]:
    """What each check says of this rank's engine, by what it was told had been asked for; "" where it agrees. Runs on every rank."""
    config = RunConfig(name="t", train=TrainConfig(max_steps=1, global_batch_size=8))
    accelerator = build_accelerator(config)
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    engine = build_engine(accelerator, model, torch.optim.AdamW(model.parameters()))
    asked = read_request(os.environ)
    other_backend = replace(asked, backend="ddp" if asked.backend != "ddp" else "single")
    optimizer = engine.optimizer
    before, num_weights = engine.heartbeat.num_main, len(list(engine.weights(trainable_only=False)))
    said = {
        "silence": "" if engine.heartbeat.num_main - before >= num_weights > 1 else "gathering gives no signs of life",
        "itself": said_by(verify_wrapper, asked, engine.model, optimizer, names),
        "backend": said_by(verify_wrapper, other_backend, engine.model, optimizer, names),
        "names": said_by(verify_wrapper, asked, engine.model, optimizer, [*names, "lost.weight"]),
        "type": said_by(verify_accelerator, accelerator, other_backend),
        "size": said_by(verify_accelerator, accelerator, replace(asked, world_size=asked.world_size + 1)),
        "precision": said_by(verify_precision, asked, engine.model, "cpu"),
        "other precision": said_by(verify_precision, replace(asked, precision="fp16"), engine.model, "cpu"),
        "offload": said_by(verify_wrapper, replace(asked, offload=True), engine.model, optimizer, names),
    }
    foreign = torch.optim.AdamW(tiny_model().parameters())
    said["optimizer"] = said_by(verify_wrapper, asked, engine.model, foreign, names)
    next(engine.model.parameters()).data = next(engine.model.parameters()).data.bfloat16()
    said["dtype"] = said_by(verify_wrapper, asked, engine.model, optimizer, names)
    return said


def said_by(check: Any, *args: Any) -> str:
    """The message of its BackendError, or nothing."""
    try:
        check(*args)
    except BackendError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_check_refuses_what_was_not_asked_for(backend: str) -> None:
    said = run_ranks(refusals, backend, 1 if backend == "single" else 2, precision="bf16")[0]
    other = "ddp" if backend != "ddp" else "single"
    assert said["itself"] == said["precision"] == said["silence"] == ""
    assert f"asked for {other}, but the model was wrapped as {backend}" in said["backend"]
    assert "changed the model's parameters while wrapping it, such as lost.weight" in said["names"]
    assert f"asked for {other}, but Accelerate would run" in said["type"]
    assert "processes, but this process group has" in said["size"]
    assert "trainable parameters must be fp32 masters" in said["dtype"]
    is_zero = backend.startswith("zero")
    assert is_zero or "of the optimizer's parameters are not the model's any more" in said["optimizer"]
    if is_zero:
        assert "asked for mixed precision (fp16), but" in said["other precision"]
        assert "would compute in torch.bfloat16" in said["other precision"]
        assert "with CPU offload, but its state stays on the device" in said["offload"]


def test_a_dtype_that_torch_would_only_warn_about_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autocast turns itself off, with a warning, where a device does not know the dtype; a CPU knows no fp64 of it."""
    monkeypatch.setitem(COMPUTE_DTYPES, "fp64", torch.float64)
    request = Request(backend="single", precision="fp64", world_size=1, on_cpu=True)
    with pytest.warns(UserWarning, match="not supported"):
        said = said_by(verify_precision, request, tiny_model(), "cpu")
    assert "asked for mixed precision (fp64), but single on cpu would compute in torch.float32" in said
