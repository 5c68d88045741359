"""Dropout is on from the first step of training, off in evaluation and in parity, and drawn anew on every rank."""

from pathlib import Path
from typing import Any

import torch
from transformers import BartForConditionalGeneration

from launch.parity import compare, read_record, verdict
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bart, tiny_bert, tiny_sentences
from trainer.backend import build_accelerator
from trainer.backend.wrap import repeated_blocks
from trainer.config import ClassificationData, FullConfig, ModelConfig, ProbeConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.dropout import FastDropout
from trainer.model.load import build_model, enable_checkpointing
from trainer.probe import recompute_in_evaluation
from trainer.task import build_task


def watch(folder: Path, probe: Path | None = None, recompute: bool = False) -> dict[str, Any]:
    """Run a few steps; for each forward pass, whether dropout was on, and what the model's first dropout let through."""
    config = RunConfig(
        name="t",
        run_dir=folder / ("probed" if probe else "run"),
        model=ModelConfig(source=str(folder / "model"), dropout=0.5, gradient_checkpointing=recompute),
        method=FullConfig(),
        data=ClassificationData(source=str(folder / "data.csv")),
        train=TrainConfig(max_steps=2, global_batch_size=8, eval_every=2),
        probe=ProbeConfig(folder=probe, steps=2) if probe else None,
    )
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    seen: dict[str, Any] = {"training": [], "kept": [], "attention_calls": 0}
    first = next(module for module in model.modules() if isinstance(module, FastDropout))

    def note(module: FastDropout, args: Any, output: Any) -> None:
        seen["training"].append(module.training)
        seen["kept"].append((output[0, 0] != 0).int().tolist())

    def count(*_: Any) -> None:
        seen["attention_calls"] += 1

    first.register_forward_hook(note)
    next(repeated_blocks(model)[0].children()).register_forward_pre_hook(count)
    Trainer(config, accelerator, model, task).fit()
    return seen


def make(folder: Path) -> Path:
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv")
    return folder


def test_dropout_is_on_from_the_first_step_and_differs_between_ranks(tmp_path: Path) -> None:
    one, other = run_ranks(watch, "ddp", 2, args=(make(tmp_path),))
    assert one["training"][:2] == [True, True] and not any(one["training"][2:])
    assert 0 in one["kept"][0] and one["kept"][0] != one["kept"][1]
    assert one["kept"][0] != other["kept"][0]


def test_parity_runs_without_dropout_and_recomputes_blocks_all_the_same(tmp_path: Path) -> None:
    make(tmp_path)
    plain = run_ranks(watch, "single", 1, args=(tmp_path, tmp_path / "plain"))[0]
    sharded = run_ranks(watch, "fsdp", 2, args=(tmp_path, tmp_path / "sharded", True))[0]
    assert not any(plain["training"] + sharded["training"])
    assert (plain["attention_calls"], sharded["attention_calls"]) == (2, 4)  # one micro-batch in each of two steps
    reference, found = (read_record(name, tmp_path / name) for name in ("plain", "sharded"))
    assert verdict(compare(reference, found), None) == "same"


def test_a_block_recomputed_in_evaluation_drops_nothing_of_its_own(tmp_path: Path) -> None:
    """BART's blocks call torch's dropout themselves, by their own flag."""
    tiny_bart(tmp_path)
    model = BartForConditionalGeneration.from_pretrained(tmp_path, dropout=0.5, activation_dropout=0.5).eval()
    ids = torch.arange(4, 16).view(2, 6)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    enable_checkpointing(model)
    recompute_in_evaluation(model)
    found = model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.equal(found, expected)
    calls: list[int] = []
    model.model.decoder.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    found.square().sum().backward()
    assert calls == [1]
