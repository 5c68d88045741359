"""Entities of texts, from a model of token classification."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.data.tagged import tokenize_tagged
from trainer.data.tags import Sentence
from trainer.entities import entities_of
from trainer.predict.answer import Answer, PredictOptions
from trainer.predict.classify import check_texts

WORD = re.compile(r"\w+|[^\w\s]")


class Tagger:
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
        self.tags, self.max_length = tuple(info["label_names"]), int(info["max_length"])

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """The entities of each text. DataError for a text that is empty."""
        check_texts(texts)
        spans = [[match.span() for match in WORD.finditer(text)] for text in texts]
        sentences = [
            Sentence(tuple(text[a:b] for a, b in words), (self.tags[0],) * len(words), number)
            for number, (text, words) in enumerate(zip(texts, spans, strict=True))
        ]
        classes, confidences = self.classes(sentences)
        ends = np.cumsum([len(words) for words in spans])
        return [
            told(
                text,
                words,
                [self.tags[c] for c in classes[end - len(words) : end]],
                confidences[end - len(words) : end],
            )
            for text, words, end in zip(texts, spans, ends, strict=True)
        ]

    @torch.inference_mode()
    def classes(self, sentences: Sequence[Sentence]) -> tuple[np.ndarray, np.ndarray]:
        """(W,) class and (W,) probability of every word."""
        made = tokenize_tagged(sentences, self.tags, self.tokenizer, self.max_length)
        classes, confidences = np.zeros(len(made.word_labels), np.int64), np.ones(len(made.word_labels))
        order = np.argsort(made.lengths, kind="stable")
        for start in range(0, len(order), self.options.batch_size):
            batch = made.batch(order[start : start + self.options.batch_size], int(self.tokenizer.pad_token_id or 0))
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            best = self.model(**inputs).logits.double().softmax(dim=-1).max(dim=-1)
            is_word = batch["words"] >= 0
            words = batch["words"][is_word].numpy()
            classes[words], confidences[words] = best.indices.cpu()[is_word].numpy(), best.values.cpu()[is_word].numpy()
        return classes, confidences


def told(text: str, words: Sequence[tuple[int, int]], tags: Sequence[str], confidences: np.ndarray) -> Answer:
    """Entities as an answer; the confidence of one is the lowest of its words."""
    found = [
        {
            "entity": kind,
            "text": text[words[first][0] : words[last - 1][1]],
            "start": words[first][0],
            "end": words[last - 1][1],
            "confidence": float(confidences[first:last].min()),
        }
        for kind, first, last in entities_of(tags)
    ]
    shown = ", ".join(f"{one['entity']} {one['text']} {one['confidence']:.3f}" for one in found) or "(no entity)"
    return Answer(f"{shown}  {' '.join(text.split())}", {"text": text, "entities": found})


def open_answerer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, info: Mapping[str, Any], options: PredictOptions
) -> Tagger:
    """With the tags and the longest sentence of the run or model source that info is of."""
    return Tagger(model, tokenizer, info, options)
