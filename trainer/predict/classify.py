"""Prediction with an exported model: labels and confidences, or numbers, of many texts, in batches of similar length.

Place in the flow: after a run, in a single process; `samestep predict` and people's own scripts use it. Invariant:
results come in the order of the texts and do not depend on the batch size beyond rounding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trainer.data.tables import surrogate_problem
from trainer.errors import ConfigError, TextError
from trainer.model.export import load_exported
from trainer.model.methods import METHODS
from trainer.predict.kinds import AnyPrediction, prediction_of, scores_of
from trainer.run_folder import find_exported

Text = str | tuple[str, str]
"""A sentence, or a pair of them for a model that was trained on pairs."""


KINDS = ("one text", "a pair of texts")
PAIR = '{"text": ..., "text_pair": ...}'
"""How a pair is written where texts are lines."""


class Predictor:
    """An exported model that is ready to predict."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label_names: Sequence[str],
        max_length: int,
        target: str = "single",
        pairs: bool | None = None,
        device: torch.device | None = None,
    ) -> None:
        """max_length: tokens. target: data.target of the training. pairs: whether it was on pairs; None where nobody knows.

        device: None takes the accelerator where there is one, else the CPU.
        """
        self.device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model = model.to(self.device).eval()
        self.tokenizer, self.label_names, self.max_length = tokenizer, tuple(label_names), max_length
        self.target, self.pairs = target, pairs

    def predict(self, texts: Sequence[Text], batch_size: int = 32) -> list[AnyPrediction]:
        """Predictions in the order of `texts`. DataError for a text that is empty, or a pair where single texts are read or the reverse."""
        assert batch_size > 0, batch_size
        check_texts(texts, self.pairs)
        samples = self.encode(texts)
        order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
        scores = np.zeros((len(samples), len(self.label_names)))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scores[batch] = self.scores([samples[index] for index in batch])
        return [self.prediction(row, sample) for row, sample in zip(scores, samples, strict=True)]

    def encode(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """One dict of unpadded lists a text, and whether it was cut."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length, padding=False)
        names = [name for name in self.tokenizer.model_input_names if name in encoded]
        is_cut = [bool(one.overflowing) for one in encoded.encodings or ()] or [False] * len(texts)
        return [
            {"is_cut": is_cut[index], **{name: encoded[name][index] for name in names}} for index in range(len(texts))
        ]

    @torch.inference_mode()
    def scores(self, samples: Sequence[dict[str, Any]], *, adapter_names: list[str] | None = None) -> np.ndarray:
        """(B, C) fp64, on the CPU: probabilities, or the value of a regression.

        adapter_names: which adapter answers each sample, for a PEFT model that holds several.
        """
        inputs = pad_right([{k: v for k, v in sample.items() if k != "is_cut"} for sample in samples], self._padding())
        names = {} if adapter_names is None else {"adapter_names": adapter_names}
        logits = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}, **names).logits
        return scores_of(logits.double().cpu().numpy(), self.target)

    def _padding(self) -> dict[str, int]:
        """The value that fills each input; the attention mask hides it."""
        return {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": self.tokenizer.pad_token_type_id}

    def prediction(self, row: np.ndarray, sample: dict[str, Any]) -> AnyPrediction:
        """What a row of scores says."""
        return prediction_of(row, self.label_names, self.target, is_cut=sample["is_cut"])


def load_predictor(run_or_folder: Path, device: torch.device | None = None, *, precision: str = "no") -> Predictor:
    """Open what a run exported: a run directory, its model folder, or a copy. CheckpointError says what is missing.

    precision: no is fp32; bf16 rounds the weights and computes in them.
    """
    folder = find_exported(run_or_folder)
    model, tokenizer, info = load_exported(folder)
    row = METHODS.get(info.get("method", ""))
    if row is not None and row.merges and not info.get("quantization"):  # merged into 4 bits it would be another model
        model = cast(Any, model).merge_and_unload()  # same numbers to rounding, and no adapter arithmetic per text
    return predictor_of(in_precision(model, precision, info), tokenizer, info, device)


def in_precision(model: nn.Module, precision: str, info: Mapping[str, Any]) -> nn.Module:
    """The model in fp32 (no) or bf16. ConfigError for a quantized base. In place."""
    if precision == "no":
        return model
    if info.get("quantization"):
        raise ConfigError("--precision (bf16): this model's base is quantized and keeps its own types; leave it out")
    return model.to(torch.bfloat16)


def predictor_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, info: Mapping[str, Any], device: torch.device | None = None
) -> Predictor:
    """Of a model whose samestep.json is `info`."""
    about = {name: info[name] for name in ("label_names", "max_length", "target", "pairs") if name in info}
    return Predictor(model, tokenizer, **about, device=device)


def check_texts(texts: Sequence[Text], pairs: bool | None = None) -> None:
    """DataError names the first text, from 1, that is empty, or a pair among single texts or the reverse.

    pairs: what all must be; None takes the kind of the first.
    """
    for number, text in enumerate(texts, start=1):
        parts = [text] if isinstance(text, str) else list(text)
        wants_pair = pairs if pairs is not None else not isinstance(texts[0], str)
        if len(parts) != 1 + wants_pair:
            like = "the first" if pairs is None else "those of the training"
            fix = f"write it as {PAIR}" if wants_pair else "predict it apart"
            raise TextError(number, f"({text!r:.80}) must be {KINDS[wants_pair]} like {like}; {fix}")
        if not all(part.strip() for part in parts):
            raise TextError(number, f"({text!r:.80}) is empty; leave it out")
        if problem := "".join(map(surrogate_problem, parts)):
            raise TextError(number, f"{problem}; write it in UTF-8")


def pad_right(samples: Sequence[dict[str, list[int]]], padding: dict[str, int]) -> dict[str, Tensor]:
    """(B, T) int64 tensors of each input, T the longest sample; `padding` fills them, 0 where it does not say."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    return {
        name: torch.tensor(
            [sample[name] + [padding.get(name, 0)] * (longest - len(sample[name])) for sample in samples]
        )
        for name in samples[0]
    }
