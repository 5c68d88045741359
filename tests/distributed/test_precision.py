"""bf16 means one thing: fp32 weights, moments and reduction, bf16 compute; so every backend is as far from fp32 as single is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from launch.preflight import this_machine
from tests.rank_pool import BACKENDS, run_ranks
from trainer.backend import build_accelerator, build_engine
from trainer.backend.build import check_bf16
from trainer.backend.request import Request
from trainer.config import RunConfig, TrainConfig
from trainer.data.batches import micro_batches
from trainer.errors import BackendError
from trainer.loss import classification_loss_sum

BATCH, STEPS = 16, 4


def small_model(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 200,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    if architecture == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0))
    return BertForSequenceClassification(
        BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32)
    )


def run(architecture: str) -> dict:
    config = RunConfig(name="t", train=TrainConfig(max_steps=STEPS, global_batch_size=BATCH))
    accelerator = build_accelerator(config)
    model = small_model(architecture)
    engine = build_engine(accelerator, model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    before = {n: t.cpu().numpy().copy() for n, t in engine.weights(trainable_only=True)}
    compute_dtypes = set()
    block_linear = next(m for m in engine.model.modules() if isinstance(m, torch.nn.Linear))
    block_linear.register_forward_hook(lambda module, args, output: compute_dtypes.add(str(output.dtype)))
    gradients, losses = {}, []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, 200, (BATCH, 12), generator=generator)
        labels = torch.randint(0, 2, (BATCH,), generator=generator)
        shares = micro_batches(np.arange(BATCH), engine.rank, engine.world_size, 4)
        for position, share in enumerate(shares):
            part = torch.from_numpy(share)
            with engine.micro_batch(last=position == len(shares) - 1):
                logits = engine.forward({"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part])}).logits
                loss = classification_loss_sum(logits, labels[part]) / BATCH
                engine.backward(loss)
            losses.append(engine.sum_over_ranks([float(loss.detach())])[0])
        norm = engine.grad_norm()
        if step == 0:
            gradients = {n: t.float().cpu().numpy().copy() for n, t in engine.gradients()}
        engine.step(norm, 1.0) if np.isfinite(norm) else engine.discard()
    update = {n: t.cpu().numpy() - before[n] for n, t in engine.weights(trainable_only=True)}
    dtypes = {str(p.dtype) for p in engine.model.parameters()} | {
        str(s.dtype) for state in engine.optimizer.state.values() for k, s in state.items() if k.startswith("exp_avg")
    }
    return {
        "gradients": gradients, "update": update, "losses": losses, "stored": dtypes, "computed": compute_dtypes,
        "scale": engine.loss_scale,
    }  # fmt: skip


def distance(found: dict, reference: dict, key: str) -> float:
    difference = sum(float(((found[key][n] - reference[key][n]) ** 2).sum()) for n in reference[key])
    return (difference / sum(float((reference[key][n] ** 2).sum()) for n in reference[key])) ** 0.5


@pytest.fixture(scope="module")
def references() -> dict:
    return {
        (architecture, precision): run_ranks(run, "single", 1, args=(architecture,), precision=precision)[0]
        for architecture in ("bert", "llama")
        for precision in ("no", "bf16", "fp16")
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "single"])
def test_low_precision_is_as_far_from_fp32_as_single_is(backend, architecture, precision, references) -> None:
    found = run_ranks(run, backend, 2, args=(architecture,), precision=precision)[0]
    exact, single = references[architecture, "no"], references[architecture, precision]
    for key in ("gradients", "update"):
        assert 0 < distance(found, exact, key) <= 1.5 * distance(single, exact, key), key
    assert found["stored"] == {"torch.float32"}
    assert found["computed"] == {"torch.bfloat16" if precision == "bf16" else "torch.float16"}


def test_fp16_scales_the_loss_and_keeps_the_gradient(references) -> None:
    assert references["bert", "fp16"]["scale"] == 2.0**16
    assert distance(references["bert", "fp16"], references["bert", "no"], "gradients") < 0.01


def test_bf16_that_the_gpu_only_emulates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not this_machine().has_bf16
    asked = Request(backend="single", precision="bf16", world_size=1, on_cpu=False)
    with pytest.raises(BackendError, match=r"\(bf16\): this GPU does not compute in bf16; start with .* fp16 or no"):
        check_bf16(asked, use_cpu=False)
    check_bf16(asked, use_cpu=True)
    check_bf16(replace(asked, precision="fp16"), use_cpu=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_bf16(asked, use_cpu=False)
