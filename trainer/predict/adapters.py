"""Prediction with several adapters on one base: the base is loaded once, and every request names its adapter.

Place in the flow: beside classify.py, for `samestep predict --adapters`. Invariant: a request's answer is that of its adapter alone.
LoRA adapters with equally many labels share batches (PEFT's `adapter_names`); others take turns.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer

from trainer.errors import CheckpointError
from trainer.model.adapters import find_adapter
from trainer.model.bottleneck import SETTINGS_FILE
from trainer.model.export import load_base
from trainer.predict.classify import Text, check_texts, predictor_of
from trainer.predict.kinds import AnyPrediction

MIXABLE = ("lora", "rslora", "qlora")
"""Methods whose layers PEFT runs with a different adapter for each row of a batch."""

PEFT_KINDS = dict.fromkeys(("lora", "dora", "rslora", "qlora"), "lora")
"""Methods that are one kind to PEFT."""


class AdapterPredictor:
    """One base and its adapters by name."""

    def __init__(self, runs: Mapping[str, Path], device: torch.device | None = None) -> None:
        """runs: name -> run directory or exported folder. CheckpointError where one is no adapter, or they have not one base."""
        from peft import PeftModel

        assert runs, "no adapter"
        found = {name: find_adapter(path) for name, path in runs.items()}
        check_one_base(found)
        (first, (folder, info)), *rest = found.items()
        model = PeftModel.from_pretrained(load_base(info, trust_remote_code=False), str(folder), adapter_name=first)
        for name, (other, _) in rest:
            model.load_adapter(str(other), adapter_name=name)
        self.model: Any = model.eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.predictors = {
            name: predictor_of(self.model, tokenizer, about, device) for name, (_, about) in found.items()
        }
        infos = [about for _, about in found.values()]
        same = len({(len(about["label_names"]), about["max_length"], about.get("target")) for about in infos}) == 1
        self.mixes = same and all(about["method"] in MIXABLE for about in infos) and has_linear_heads(self.model)
        """Whether requests for different adapters share batches."""

    def predict(self, requests: Sequence[tuple[Text, str]], batch_size: int = 32) -> list[AnyPrediction]:
        """Answers in the order of the requests, each (text, name of its adapter). DataError for a text that is empty."""
        check_texts([text for text, _ in requests])
        if self.mixes:
            return self._predict_mixed(requests, batch_size)
        answers: dict[int, AnyPrediction] = {}
        for name, predictor in self.predictors.items():
            places = [place for place, (_, wanted) in enumerate(requests) if wanted == name]
            self.model.set_adapter(name)
            answers |= dict(
                zip(places, predictor.predict([requests[place][0] for place in places], batch_size), strict=True)
            )
        return [answers[place] for place in range(len(requests))]

    def _predict_mixed(self, requests: Sequence[tuple[Text, str]], batch_size: int) -> list[AnyPrediction]:
        """Batches of similar length, whatever their adapters."""
        any_one = next(iter(self.predictors.values()))
        samples = any_one.encode([text for text, _ in requests])
        order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
        scores = np.zeros((len(samples), len(any_one.label_names)))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            names = [requests[index][1] for index in batch]
            scores[batch] = any_one.scores([samples[index] for index in batch], adapter_names=names)
        return [
            self.predictors[name].prediction(row, sample)
            for (_, name), row, sample in zip(requests, scores, samples, strict=True)
        ]

    def num_bytes(self) -> int:
        """Of all weights in memory."""
        return sum(p.numel() * p.element_size() for p in cast(torch.nn.Module, self.model).parameters())


def has_linear_heads(model: torch.nn.Module) -> bool:
    """Whether all modules that PEFT trained as a copy are linear layers: it runs no other with an adapter for each row (0.21)."""
    from peft.utils.other import ModulesToSaveWrapper

    copied = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return all(isinstance(module.original_module, torch.nn.Linear) for module in copied)


def check_one_base(found: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> None:
    """CheckpointError unless all adapters are PEFT's, for one task, on one base."""
    (first, (_, info)), *rest = found.items()
    for name, (folder, about) in found.items():
        if (folder / SETTINGS_FILE).is_file():
            raise CheckpointError(
                f"--adapters ({name}): bottleneck adapters take the place of layers, so one base holds one of them; predict with it alone"
            )
        if about.get("task", "classification") != "classification":
            raise CheckpointError(f"--adapters ({name}) is for task {about['task']}, and predict is for classification")
    if len({PEFT_KINDS.get(about["method"], about["method"]) for _, about in found.values()}) > 1:
        methods = ", ".join(f"{name} ({about['method']})" for name, (_, about) in found.items())
        raise CheckpointError(
            f"--adapters: PEFT holds adapters of one kind on a base, not {methods}; predict with each kind apart"
        )
    for name, (_, about) in rest:
        for key in ("base", "quantization", "pooling", "head_layers"):
            if about.get(key) != info.get(key):
                raise CheckpointError(
                    f"--adapters: {name} belongs to {key} {about.get(key)}, but {first} to {info.get(key)}; give adapters of one base"
                )
