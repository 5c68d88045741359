"""Exported adapters of a tiny Llama, and copies of an adapter with other weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from tests.tiny import tiny_llama, tiny_t5

ADAPTER = "adapter_model.safetensors"


def llama_base(folder: Path, hidden_size: int = 64) -> Path:
    """A drawn tiny Llama that knows the words w0 to w59, with its tokenizer. Returns `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_t5(folder.with_name(folder.name + "-words")))
    config = LlamaConfig.from_pretrained(tiny_llama(folder))
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.hidden_size, config.head_dim = hidden_size, hidden_size // config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_clm(folder: Path, base: Path, method: dict[str, Any]) -> Path:
    """The run directory of an adapter whose weights are drawn. Returns `folder`."""
    from accelerate import Accelerator

    from trainer.config import RunConfig, StreamData, TrainConfig
    from trainer.model.export import export_model
    from trainer.model.identity import base_identity
    from trainer.model.load import build_model, load_tokenizer

    config = RunConfig(
        name="tiny",
        model={"source": str(base), "task": "clm"},  # type: ignore[arg-type]
        method=method,  # type: ignore[arg-type]
        data=StreamData(isolate=False),
        train=TrainConfig(max_steps=1, metric="loss"),
    )
    model = build_model(config, (), Accelerator(cpu=True))
    info = {"task": "clm", "method": config.method.name, "base": str(base), "base_identity": base_identity(model)}
    info["quantization"] = config.method.model_dump(include={"quantize", "double_quantization"}) or None
    trained = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    state = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in trained.items()}
    folder.mkdir()
    export_model(model, state, load_tokenizer(config.model), folder / "model", info)
    return folder


def varied(run: Path, folder: Path, seed: int, scale: float = 0.1) -> Path:
    """A copy of a run whose adapter has other weights. Returns `folder`."""
    shutil.copytree(run, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(folder / "model" / ADAPTER).items()
    }
    save_file(tensors, folder / "model" / ADAPTER, {"format": "pt"})
    return folder


def change_base(folder: Path, word: str = "") -> None:
    """Put other weights into the tensors of a model's folder whose names hold `word`."""
    file = folder / "model.safetensors"
    tensors = {name: tensor + 0.01 * (word in name) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def change_json(file: Path, **changes: Any) -> None:
    """Set entries of a JSON file; None takes one away."""
    entries = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def command(*argv: object) -> int:
    """The exit code of `samestep ...`."""
    try:
        main([str(word) for word in argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("it did not exit")
