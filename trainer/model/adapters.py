"""Exported adapters: what they are, merging them into their base, and what a merge changes.

Place in the flow: after a run, in one process; `samestep adapter` uses it. Invariant: a merged folder has been opened again before `merge`
returns, and an adapter that cannot be merged is refused, never approximated in silence.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from trainer.errors import CheckpointError, ConfigError
from trainer.model.bottleneck import SETTINGS_FILE
from trainer.model.export import (
    exported_tokenizer,
    load_base,
    load_exported,
    opening,
    put_adapter,
    read_sizes,
    verify_tensors,
    write_info,
)
from trainer.model.methods import METHODS
from trainer.model.stored import stored_tensors
from trainer.run_folder import ADAPTER_FILE, INFO_FILE, MODEL_FOLDER, read_info

Into = Literal["base", "dequantized"]
COMPARED = ("classification", "token_classification", "clm")
"""Tasks whose outputs are one distribution a text or a token."""


@dataclass(frozen=True)
class Difference:
    """How the outputs of two models differ over some texts."""

    num_positions: int
    """Next-token or class distributions that were compared."""
    mean_kl: float
    """Mean Kullback-Leibler divergence from the first model's distribution to the second's, in nats."""
    top1_agreement: float
    """Share of positions where both hold the same outcome for the most probable."""
    max_logit_difference: float

    @property
    def verdict(self) -> str:
        """In words: equal to rounding, close, or another model."""
        if self.mean_kl < 1e-6 and self.top1_agreement > 0.999:
            return "the same model, to rounding"
        if self.mean_kl < 1e-2 and self.top1_agreement > 0.97:
            return "close: measure your own task before you use it"
        return "ANOTHER MODEL: do not use it in place of the adapter"


def find_adapter(path: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, samestep.json) of an exported adapter: `path`, or the model folder in it. CheckpointError for anything else."""
    folder = path if any((path / name).is_file() for name in (INFO_FILE, ADAPTER_FILE)) else path / MODEL_FOLDER
    try:
        info = read_info(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"RUN ({path}) has no exported adapter ({error}); give a run directory such as runs/qlora_instruct"
        ) from None
    if info.get("method") not in METHODS or "base" not in info:
        raise CheckpointError(f"{folder / INFO_FILE} lacks method or base; take the model folder from its run again")
    if not METHODS[info["method"]].is_adapter:
        raise CheckpointError(
            f"RUN ({path}) exported a whole model (method {info['method']}), which needs no base; there is no adapter in it"
        )
    return folder, info


def merged(folder: Path, info: Mapping[str, Any], into: Into, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base with the adapter in its weights, fp32, on the CPU.

    into: for a quantized base, `dequantized` is the base that the adapter was trained on, and `base` the one before quantization, to which
    the adapter is not fitted. ConfigError for a method that no weights can express.
    """
    if not METHODS[info["method"]].merges:
        raise ConfigError(
            f"RUN ({folder}): an adapter of method {info['method']} adds no weights to a layer and cannot be merged; "
            f"merging works for {', '.join(name for name, row in METHODS.items() if row.merges)}"
        )
    quantized = bool(info.get("quantization"))
    if into == "dequantized" and not quantized:
        raise ConfigError("--into (dequantized): the base of this adapter is not quantized; use --into base")
    keeps = {**info, "quantization": info.get("quantization") if into == "dequantized" else None}
    with opening(folder):
        base = load_base(keeps, trust_remote_code=trust_remote_code)
        turned = [name for name, one in base.named_modules() if getattr(one, "source_cls", None) is Conv1D]
        if into == "dequantized":
            base = cast(PreTrainedModel, cast(Any, base).dequantize(dtype=torch.float32))
        adapted = put_adapter(base, folder, info)
        whole = cast(Any, adapted).merge_and_unload().to("cpu")  # a quantized base is on the GPU where there is one
        for name in turned if into == "dequantized" else ():
            whole.set_submodule(name, conv_of(whole.get_submodule(name)))
        return cast(PreTrainedModel, whole).eval()


def conv_of(linear: nn.Linear) -> Conv1D:
    """GPT-2's layer, whose weight is transposed: transformers quantizes it as a linear layer, and as one it comes back (5.23)."""
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
    conv.bias = linear.bias
    return conv


def merge(folder: Path, info: Mapping[str, Any], into: Into, target: Path, *, trust_remote_code: bool = False) -> None:
    """Write the merged model, its tokenizer and samestep.json into `target`, which must not exist or be empty, and open it again."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"--output ({target}) exists already; give a folder that does not exist yet")
    with opening(folder):
        facts = dict(info)
        tokenizer = exported_tokenizer(folder, facts, trust_remote_code=trust_remote_code)
    model = merged(folder, info, into, trust_remote_code=trust_remote_code)
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        for name in ("quantization", "base_identity"):
            facts.pop(name, None)
        facts |= {"method": "full", "merged": {"method": info["method"], "into": into}}
        write_info(target, facts)
        saved = stored_tensors(model)
        verify_tensors(target, {name: tensor.numel() for name, tensor in saved.items()})
        loaded = stored_tensors(load_exported(target, trust_remote_code=trust_remote_code)[0])
        for name, tensor in saved.items():
            if not torch.equal(loaded[name], tensor):
                raise CheckpointError(f"{target}: {name} did not come back equal; merge again")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


@torch.no_grad()
def compare(
    first: nn.Module,
    second: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 256,
) -> Difference:
    """Run both models over the texts, one by one, and compare their distributions."""
    positions, kl, same, largest = 0, 0.0, 0, 0.0
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        one, two = (
            flat_logits(logits_on_cpu(model, inputs), getattr(first, "config", None)) for model in (first, second)
        )
        positions += len(one)
        kl += float(divergences(one, two).sum())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
        largest = max(largest, float((one - two).abs().max()))
    return Difference(positions, max(kl, 0.0) / max(positions, 1), same / max(positions, 1), largest)


def logits_on_cpu(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Of a model on any device."""
    device = getattr(next(model.parameters(), None), "device", torch.device("cpu"))
    found: Tensor = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.cpu()
    return found


def flat_logits(logits: Tensor, config: PretrainedConfig | None) -> Tensor:
    """(positions, outcomes) in fp64, of a classifier's (B, C) or a language model's (B, T, V).

    Each of several labels is a position with two outcomes; a number is a position with one.
    """
    flat = logits.double().flatten(0, -2)
    if getattr(config, "problem_type", None) != "multi_label_classification":
        return flat
    return torch.stack([torch.zeros_like(flat), flat], dim=-1).flatten(0, -2)


def divergences(one: Tensor, two: Tensor) -> Tensor:
    """Kullback-Leibler divergence at each position, in nats. Numbers (positions, 1) are means of normal distributions of variance 1."""
    if one.shape[-1] == 1:
        return (one - two).square().squeeze(-1) / 2
    log_one, log_two = one.log_softmax(-1), two.log_softmax(-1)
    return (log_one.exp() * (log_one - log_two)).sum(-1)


def adapter_facts(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Method, base, size and settings of an exported adapter, without loading it. CheckpointError for files that are damaged."""
    with opening(folder):
        sizes = read_sizes(folder)
        file = folder / (ADAPTER_FILE if (folder / ADAPTER_FILE).is_file() else SETTINGS_FILE)
        settings = json.loads(file.read_text(encoding="utf-8"))
    return {
        "method": info["method"],
        "base": info["base"],
        "quantization": info.get("quantization"),
        "step": info.get("step"),
        "tensors": sizes,
        "num_parameters": sum(sizes.values()),
        "num_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "settings": settings,
    }
