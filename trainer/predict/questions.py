"""Answers to questions about a context, from a model of extractive question answering.

Invariant: an answer does not depend on the batch size beyond rounding, and stands in the context where it says.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.config import QuestionData
from trainer.data.questions import Question
from trainer.data.tables import surrogate_problem
from trainer.data.tokens import LARGEST_LIMIT
from trainer.data.windows import Windows, make_windows
from trainer.errors import TextError
from trainer.predict.answer import Answer, PredictOptions
from trainer.spans import best_spans


class QuestionAnswerer:
    """Implements `Answerer`; see answer.py. A text is a question, or a JSON object with question and context."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        info: Mapping[str, Any],
        options: PredictOptions,
    ) -> None:
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model, self.tokenizer, self.options = model.to(self.device).eval(), tokenizer, options
        usual, limit = QuestionData(), tokenizer.model_max_length
        self.max_length = int(
            info.get("max_length", min(usual.max_length, limit if 0 < limit < LARGEST_LIMIT else 512))
        )
        self.stride = int(info.get("stride", min(usual.stride, self.max_length // 2)))
        self.max_answer_length = int(info.get("max_answer_length", usual.max_answer_length))
        self.may_have_no_answer = bool(info.get("no_answer", False))

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """The stretch of the context that answers each question, or "". DataError for a question without a context."""
        questions = [asked(text, self.options.context, number) for number, text in enumerate(texts, start=1)]
        if not questions:
            return []
        windows = make_windows(questions, self.tokenizer, max_length=self.max_length, stride=self.stride)
        notes = self.notes(windows)
        of_question = np.split(notes, np.flatnonzero(np.diff(windows.questions)) + 1)
        return [self.best(question, rows) for question, rows in zip(questions, of_question, strict=True)]

    @torch.inference_mode()
    def notes(self, windows: Windows) -> np.ndarray:
        """(W, 5) of each window: score, first and last + 1 character, logarithm of the sum over all stretches, score of no answer."""
        notes = np.zeros((len(windows), 5))
        order = np.argsort(windows.lengths, kind="stable")
        for place in range(0, len(order), self.options.batch_size):
            ids = order[place : place + self.options.batch_size]
            batch = windows.batch(ids, int(self.tokenizer.pad_token_id or 0))
            del batch["labels"]
            outputs: Any = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})
            start, end = outputs.start_logits.double().cpu(), outputs.end_logits.double().cpu()
            best = best_spans(start, end, windows.inside[ids], self.max_answer_length)
            first, last = windows.characters(ids, best.first, best.last)
            rows = np.arange(len(ids))
            no_answer = (start + end).numpy()[rows, windows.cls[ids]]
            notes[ids] = np.stack([best.score, first, last, best.log_total, no_answer], axis=1)
        return notes

    def best(self, question: Question, rows: np.ndarray) -> Answer:
        """The answer of the best of a question's windows. Its confidence: its share of exp(score) over all stretches of all windows."""
        score, first, last, *_ = rows[rows[:, 0].argmax()]
        total, no_answer = np.logaddexp.reduce(rows[:, 3]), rows[:, 4].min()
        has_answer = np.isfinite(score) and not (self.may_have_no_answer and no_answer > score)
        if self.may_have_no_answer:
            total = np.logaddexp(total, no_answer)
        text = question.context[int(first) : int(last)]
        start = int(first) + len(text) - len(text.lstrip())
        answer = text.strip() if has_answer else ""
        confidence = float(np.exp((score if has_answer else no_answer) - total)) if np.isfinite(total) else 0.0
        facts: dict[str, object] = {"text": question.question, "answer": answer, "confidence": confidence}
        facts |= {"start": start, "end": start + len(answer)} if has_answer else {"start": None, "end": None}
        words = " ".join(answer.split()) or "(no answer)"
        return Answer(f"{words}  {confidence:.4f}  {' '.join(question.question.split())}", facts)


def asked(text: str, context: str | None, number: int) -> Question:
    """The question of a text, and what it is about. DataError names the text by its number, from 1."""
    question: object = text
    if text.lstrip().startswith("{"):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise TextError(number, f"({text:.60}) is no JSON object ({error}); correct it") from None
        question, context = row.get("question"), row.get("context", context)
    if not isinstance(question, str) or not question.strip():
        raise TextError(
            number, f'({text:.60}) has no question; give a question, or {{"question": ..., "context": ...}}'
        )
    if not isinstance(context, str) or not context.strip():
        raise TextError(
            number,
            f"({question:.60}) has no context to answer from; give one with --context, or write the text as "
            '{"question": ..., "context": ...}',
        )
    if problem := surrogate_problem(question) or surrogate_problem(context):
        raise TextError(number, f"{problem}; write it in UTF-8")
    return Question(question, context)


def open_answerer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, info: Mapping[str, Any], options: PredictOptions
) -> QuestionAnswerer:
    """With the window of the run that info is of; of a model source the usual one."""
    return QuestionAnswerer(model, tokenizer, info, options)
