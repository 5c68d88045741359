"""Any backend's checkpoint under any other: weights, moments and step count exact, the next losses those of the run that went on.

At the level of the engine, so that models may be awkward: tied embeddings and biases, a tensor of one row, several parameter groups, a
frozen bf16 base under an adapter of rank 1. The oracle for weights and moments is what the libraries themselves gather, not our pieces.
"""

import itertools
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from tests.rank_pool import BACKENDS, run_ranks
from trainer.backend import Engine, build_accelerator, build_engine
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import Start
from trainer.config import ModelConfig, OptimConfig, QloraConfig, RunConfig, TrainConfig
from trainer.data.batches import IGNORED, micro_batches
from trainer.model.load import load_architecture, load_weights, quantization_of
from trainer.model.stored import saved_buffers
from trainer.progress import Progress

BATCH, SAVED, LAST, VOCABULARY = 12, 3, 6, 50
METHODS = ("full", "lora", "qlora")
Pair = tuple[str, str]
"""The backend that saved, and the method."""
MOMENTS = ("exp_avg", "exp_avg_sq")
BF16 = 2e-2
"""Relative, of losses in bf16: backends round at other places, and micro-batches of other ranks by other amounts."""


def tiny_model(method: str, seed: int) -> nn.Module:
    """full: tied embeddings, tied bias, a token type embedding of one row. lora: rank 1 over a frozen bf16 base; qlora: a 4-bit one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **sizes,
    )
    if method == "full":
        model: nn.Module = BertForMaskedLM(config)
        model.cls.register_buffer("count", torch.tensor(seed))  # belongs to the model, and is not trained
        model.bert.register_buffer("mask", torch.arange(7) % 2 == seed)
    else:
        from peft import LoraConfig, get_peft_model

        base = BertForSequenceClassification(config)
        base = in_four_bits(base) if method == "qlora" else base.to(torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=1, target_modules=["query", "value"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if seed:  # other trainable weights than those that were saved: a restore that does nothing is seen
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def in_four_bits(model: Any) -> nn.Module:
    """The same weights with those of the blocks in NF4, as samestep quantizes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.to_json_file(f"{folder}/config.json")  # on every rank: save_pretrained writes on rank 0 alone
        save_tensors(model.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        source = ModelConfig(source=folder)
        architecture = load_architecture(source, ("0", "1"))
        quantization = quantization_of(source, QloraConfig(), architecture, precision="no")
        return load_weights(source, architecture, quantization)[0]


def any_accelerator() -> Any:
    return build_accelerator(RunConfig(name="x", train=TrainConfig(max_steps=1, resume="never")))


def build(method: str, folder: Path, accelerator: Any, seed: int) -> tuple[Engine, Checkpointer]:
    train = TrainConfig(max_steps=LAST, global_batch_size=BATCH)
    config = RunConfig(name="any", run_dir=folder, optim=OptimConfig(max_grad_norm=0.5), train=train)
    model = tiny_model(method, seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slow = {name for name, p in trained.items() if p.ndim <= 1 or "lora_B" in name}
    groups = [
        {"params": [p for name, p in trained.items() if name not in slow], "weight_decay": 0.1},
        {"params": [p for name, p in trained.items() if name in slow], "weight_decay": 0.0, "lr_factor": 0.5},
    ]
    assert all(group["params"] for group in groups)
    engine = build_engine(accelerator, model, torch.optim.AdamW(groups, lr=1e-3))
    engine.model.train()
    return engine, Checkpointer(config, engine, identity={"base": method, "data": "tokens"})


def batch(method: str, step: int) -> dict[str, Tensor]:
    """The global batch of a step; every sample differs, and so do the ranks' shares and their numbers of targets."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCABULARY, (BATCH, 7), generator=generator)
    shape = (BATCH, 7) if method == "full" else (BATCH,)
    labels = torch.randint(0, VOCABULARY if method == "full" else 2, shape, generator=generator)
    labels[:3] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def take_step(engine: Engine, method: str, step: int) -> float:
    """One step on this rank's share; the loss of the global batch."""
    whole = batch(method, step)
    share = torch.from_numpy(micro_batches(np.arange(BATCH), engine.rank, engine.world_size, None)[0])
    part = {name: tensor[share] for name, tensor in whole.items()}
    labels = part.pop("labels")
    num_targets = float((whole["labels"] != IGNORED).sum())
    with engine.micro_batch(last=True):
        logits = engine.forward(part).logits.float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=IGNORED
        )
        engine.backward(loss / num_targets)
    engine.set_learning_rate(1e-2 / (step + 1))
    engine.step(engine.grad_norm(), 0.5)
    return engine.sum_over_ranks([float(loss.detach())])[0] / num_targets


def gathered(engine: Engine) -> dict[str, np.ndarray]:
    """All weights and moments, whole, as the libraries gather them."""
    tensors = {f"weight/{name}": tensor.clone() for name, tensor in engine.weights(trainable_only=True)}
    if engine.backend in (
        "zero1",
        "zero2",
    ):  # DeepSpeed 0.19 links moments after the first group's step: later groups have none
        engine.model.optimizer._hp_optimizer_states_linked = False
        engine.model.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine._trainable():
        for kind in MOMENTS:
            if engine.backend.startswith("zero"):
                from deepspeed.utils import safe_get_full_optimizer_state

                moment = safe_get_full_optimizer_state(parameter, kind)
            else:
                moment = engine.optimizer.state[parameter][kind]
                moment = moment.full_tensor() if hasattr(moment, "full_tensor") else moment
            tensors[f"{kind}/{name}"] = moment.clone()
    tensors |= {f"buffer/{name}": buffer for name, buffer in saved_buffers(engine.module).items()}
    return {key: tensor.float().cpu().numpy() for key, tensor in tensors.items()}


def save_midway(root: Path, backend: str) -> dict[str, list[float]]:
    """On every rank: train each method to the end, with a checkpoint and the gathered truth on the way. Losses after the checkpoint."""
    losses = {}
    accelerator = any_accelerator()
    for method in METHODS:
        folder = root / f"{backend}-{method}"
        accelerator.free_memory()
        engine, checkpoints = build(method, folder, accelerator, seed=0)
        for step in range(SAVED):
            take_step(engine, method, step)
        truth = gathered(engine)
        if engine.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(truth, folder / "truth.safetensors")
        checkpoints.save(Progress(step=SAVED), {}, metric=None)
        losses[method] = [take_step(engine, method, step) for step in range(SAVED, LAST)]
        checkpoints.wait()
        checkpoints.close()
    return losses


def pairs(sources: Iterable[str], methods: Iterable[str] = ("full", "lora")) -> list[Pair]:
    """Each source with each method."""
    return list(itertools.product(sources, methods))


def resume_each(root: Path, wanted: list[Pair]) -> dict[Pair, dict[str, Any]]:
    """On every rank: take up each checkpoint, compare with its truth, go on."""
    found = {}
    accelerator = any_accelerator()
    for source, method in wanted:
        folder = root / f"{source}-{method}"
        accelerator.free_memory()
        engine, checkpoints = build(method, folder, accelerator, seed=1)
        if source == wanted[-1][0]:
            take_step(engine, method, LAST)  # as in a rollback: there are moments and gathered weights to overwrite
        progress = checkpoints.restore(Start("continue", (folder / "checkpoints" / f"step-{SAVED:08d}",)))
        truth, now = load_file(folder / "truth.safetensors"), gathered(engine)
        wrong = [key for key in truth.keys() | now.keys() if not np.array_equal(truth.get(key), now.get(key))]
        losses = [take_step(engine, method, step) for step in range(progress.step, LAST)]
        found[source, method] = {"wrong": sorted(wrong), "losses": losses, "num_tensors": len(truth)}
        checkpoints.close()
    return found


def assert_went_on(found: dict[Pair, dict[str, Any]], expected: Mapping[str, dict[str, list[float]]]) -> None:
    """Weights and moments exact, and the losses those of the run that saved: by source and method."""
    for (source, method), facts in found.items():
        assert facts["num_tensors"] > 10
        assert facts["wrong"] == [], (source, method)
        assert facts["losses"] == pytest.approx(expected[source][method], rel=1e-5), (source, method)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, list[float]]]]:
    """A checkpoint of every backend and method, and the losses that its own run had afterwards."""
    root = tmp_path_factory.mktemp("any")
    ranks = {backend: 1 if backend == "single" else 2 for backend in BACKENDS}
    return root, {b: run_ranks(save_midway, b, ranks[b], args=(root, b))[0] for b in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_goes_on_from_every_backend(backend: str, saved: Any) -> None:
    root, expected = saved
    before = BACKENDS[BACKENDS.index(backend) - 1]
    ranks = 1 if backend == "single" else 2
    wanted = [*pairs(BACKENDS), (before, "qlora")]
    for found in run_ranks(resume_each, backend, ranks, args=(root, wanted)):
        assert list(found) == wanted
        assert_went_on(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_qlora_goes_on_from_every_backend_on_every_backend(backend: str, saved: Any) -> None:
    root, expected = saved
    ranks = 1 if backend == "single" else 2
    for found in run_ranks(resume_each, backend, ranks, args=(root, pairs(BACKENDS, ["qlora"]))):
        assert_went_on(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_three_ranks_go_on_from_one_and_two(backend: str, saved: Any) -> None:
    root, expected = saved
    for found in run_ranks(resume_each, backend, 3, args=(root, pairs(("single", "fsdp", "zero2", "zero3"), METHODS))):
        assert_went_on(found, expected)


@pytest.fixture(scope="module")
def saved_by_3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, list[float]]]]:
    """The same by three ranks of the sharded backends."""
    root = tmp_path_factory.mktemp("three")
    return root, {b: run_ranks(save_midway, b, 3, args=(root, b))[0] for b in ("fsdp", "zero2", "zero3")}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("single", 1), *[(b, 2) for b in BACKENDS[1:]]])
def test_one_and_two_ranks_go_on_from_three(backend: str, ranks: int, saved_by_3: Any) -> None:
    root, expected = saved_by_3
    for found in run_ranks(resume_each, backend, ranks, args=(root, pairs(expected, METHODS))):
        assert_went_on(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp_offload", "zero2_offload", "zero3_offload"])
def test_offloaded_state_goes_on_from_any_and_is_gone_on_from(backend: str, saved: Any, tmp_path: Path) -> None:
    root, expected = saved
    assert_went_on(
        run_ranks(resume_each, backend, 2, args=(root, pairs(("ddp", "fsdp", "zero2", "zero3"))))[0], expected
    )
    losses = run_ranks(save_midway, backend, 2, args=(tmp_path, backend))[0]
    assert_went_on(run_ranks(resume_each, "single", 1, args=(tmp_path, pairs([backend])))[0], {backend: losses})


@pytest.mark.parametrize(
    ("source", "target"), [("fsdp", "zero3"), ("zero2", "ddp"), ("ddp", "fsdp"), ("single", "zero1")]
)
def test_bf16_runs_hand_over_their_fp32_masters(source: str, target: str, tmp_path: Path) -> None:
    """Exactly: from here on fp32 would lose the same on both. In bf16 each backend rounds in its own way."""
    ranks = {backend: 1 if backend == "single" else 2 for backend in (source, target)}
    in_bf16 = run_ranks(save_midway, source, ranks[source], args=(tmp_path, source), precision="bf16")[0]
    wanted = pairs([source])
    in_fp32 = run_ranks(resume_each, source, ranks[source], args=(tmp_path, wanted))[0]
    expected = {source: {method: in_fp32[source, method]["losses"] for _, method in wanted}}
    assert_went_on(run_ranks(resume_each, target, ranks[target], args=(tmp_path, wanted))[0], expected)
    for found in run_ranks(resume_each, target, ranks[target], args=(tmp_path, wanted), precision="bf16"):
        for (_, method), facts in found.items():
            assert facts["wrong"] == [], method
            assert facts["losses"] == pytest.approx(in_bf16[method], rel=BF16), method


TOPOLOGIES = [("single", 1), *[(backend, ranks) for backend in BACKENDS[1:] for ranks in (2, 3)]]


@pytest.fixture(scope="module", params=["no", "bf16"])
def saved_by_all(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In one precision: every topology's checkpoints, in a folder of its own, and its losses afterwards."""
    root, precision, losses = tmp_path_factory.mktemp("all"), request.param, {}
    for backend, ranks in TOPOLOGIES:
        folder = root / str(ranks)
        losses[backend, ranks] = run_ranks(save_midway, backend, ranks, args=(folder, backend), precision=precision)[0]
    return root, precision, losses


@pytest.mark.all
@pytest.mark.parametrize(("backend", "ranks"), TOPOLOGIES)
def test_every_topology_goes_on_from_every_topology_in_every_precision(
    backend: str, ranks: int, saved_by_all: Any
) -> None:
    root, precision, losses = saved_by_all
    for number in (1, 2, 3):
        sources = tuple(source for source, of_ranks in TOPOLOGIES if of_ranks == number)
        arguments = (root / str(number), pairs(sources))
        found = run_ranks(resume_each, backend, ranks, args=arguments, precision=precision, timeout_s=300)[0]
        for (source, method), facts in found.items():
            assert facts["wrong"] == [], (source, number, method)
            tolerance = 1e-5 if precision == "no" else BF16
            assert facts["losses"] == pytest.approx(losses[source, number][method], rel=tolerance), (source, method)
