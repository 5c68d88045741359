"""The likeliest tokens behind the masks of a text, from a model of masked tokens. Several masks in a text are filled each on its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.data.tokens import LARGEST_LIMIT
from trainer.errors import TextError
from trainer.predict.answer import Answer, PredictOptions
from trainer.predict.classify import check_texts, pad_right


class MaskFiller:
    """Implements `Answerer`; see answer.py."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        info: Mapping[str, Any],
        options: PredictOptions,
    ) -> None:
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model, self.tokenizer, self.options = model.to(self.device).eval(), tokenizer, options
        limit = tokenizer.model_max_length
        self.max_length = int(info.get("sequence_length") or (limit if limit < LARGEST_LIMIT else 512))

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """The candidates for each mask, likeliest first. DataError for a text that is empty, without a mask, or too long."""
        check_texts(texts)
        samples = [self.encoded(text, number) for number, text in enumerate(texts, start=1)]
        order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
        found: dict[int, list[list[tuple[int, float]]]] = {}
        for start in range(0, len(order), self.options.batch_size):
            batch = order[start : start + self.options.batch_size]
            found |= dict(zip(batch, self.candidates([samples[index] for index in batch]), strict=True))
        return [self.told(text, samples[index]["input_ids"], found[index]) for index, text in enumerate(texts)]

    def encoded(self, text: str, number: int) -> dict[str, list[int]]:
        """The tokens of a text, framed."""
        tokenizer = self.tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        frame = [id for id in (tokenizer.cls_token_id, tokenizer.sep_token_id) if id is not None]
        ids = [*frame[:1], *ids, *frame[1:]]
        if tokenizer.mask_token_id not in ids:
            raise TextError(
                number, f"({text!r:.80}) has no mask; put {tokenizer.mask_token} where a token is to be found"
            )
        if len(ids) > self.max_length:
            raise TextError(
                number, f"({text!r:.60}) has {len(ids):,} tokens, and the model reads {self.max_length:,}; shorten it"
            )
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    @torch.inference_mode()
    def candidates(self, samples: Sequence[dict[str, list[int]]]) -> list[list[list[tuple[int, float]]]]:
        """Of each sample, of each of its masks: (token, probability), likeliest first."""
        batch = pad_right(samples, {"input_ids": int(self.tokenizer.pad_token_id or 0)})
        outputs: Any = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})
        logits = outputs.logits if "logits" in outputs else outputs.prediction_logits
        is_mask = batch["input_ids"] == self.tokenizer.mask_token_id
        best = logits[is_mask.to(self.device)].double().softmax(dim=-1).topk(min(self.options.top_k, logits.shape[-1]))
        pairs = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        counts = is_mask.sum(dim=1).tolist()
        return [pairs[sum(counts[:row]) : sum(counts[: row + 1])] for row in range(len(samples))]

    def told(self, text: str, ids: Sequence[int], masks: Sequence[Sequence[tuple[int, float]]]) -> Answer:
        """Candidates as an answer."""
        decode, best = self.tokenizer.decode, iter(masks)
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.mask_token_id}
        filled = [
            next(best)[0][0] if token == self.tokenizer.mask_token_id else token
            for token in ids
            if token not in special
        ]
        named = [
            [{"token": str(decode([token])).strip(), "probability": value} for token, value in mask] for mask in masks
        ]
        words = " | ".join(", ".join(f"{one['token']} {one['probability']:.3f}" for one in mask) for mask in named)
        return Answer(
            f"{words}  {' '.join(text.split())}", {"text": text, "masks": named, "filled": str(decode(filled))}
        )


def open_answerer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, info: Mapping[str, Any], options: PredictOptions
) -> MaskFiller:
    """A filler of masks."""
    return MaskFiller(model, tokenizer, info, options)
