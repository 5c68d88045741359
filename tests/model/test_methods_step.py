"""Every method takes a training step on every kind of language model that its row in the table claims, in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.exported_runs import llama_base
from tests.tiny import tiny_t5
from trainer.config import RunConfig
from trainer.model.load import build_model
from trainer.model.methods import METHODS

DATA: dict[str, dict[str, Any]] = {"clm": {"kind": "stream", "isolate": False}, "seq2seq": {"kind": "pairs"}}
LENGTH = 6


def claiming(task: str) -> list[str]:
    return [name for name, row in METHODS.items() if task in row.tasks]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with biases, which bitfit needs, and a T5."""
    root = tmp_path_factory.mktemp("sources")
    config = LlamaConfig.from_pretrained(llama_base(root / "llama"))
    config.attention_bias = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "llama")
    return {"clm": root / "llama", "seq2seq": tiny_t5(root / "t5")}


def built(task: str, method: str, source: Path) -> nn.Module:
    config = RunConfig.model_validate(
        {
            "name": "t",
            "model": {"source": str(source), "task": task},
            "method": {"name": method},
            "data": DATA[task],
            "train": {"max_steps": 1, "metric": "loss"},
        }
    )
    return build_model(config, (), Accelerator(cpu=True))


def loss_of(model: nn.Module, task: str) -> torch.Tensor:
    """The mean over the tokens of two rows; logits of virtual tokens come before theirs."""
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) + 7
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = ids
    logits = model(**inputs).logits[:, -LENGTH:-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(("task", "method"), [(task, method) for task in DATA for method in claiming(task)])
def test_a_method_that_claims_a_task_trains_its_weights_and_no_others(
    task: str, method: str, sources: dict[str, Path]
) -> None:
    model = built(task, method, sources[task]).train()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    before = loss_of(model, task)
    before.backward()
    assert torch.isfinite(before)
    assert [name for name, one in trained.items() if one.grad is None] == []
    assert max(float(one.grad.abs().max()) for one in trained.values() if one.grad is not None) > 0
    assert [name for name, one in model.named_parameters() if one.grad is not None and name not in trained] == []
    optimizer.step()
    assert loss_of(model, task) < before


def test_all_methods_of_both_kinds_are_tried() -> None:
    assert (len(claiming("clm")), len(claiming("seq2seq"))) == (12, 5)
