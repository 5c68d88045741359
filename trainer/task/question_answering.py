"""Extractive question answering: the first and the last token of the answer, in windows of a long context."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import Engine
from trainer.config import QuestionData, RunConfig
from trainer.data.batches import IGNORED, GlobalBatches, evaluation_batches, rank_share
from trainer.data.questions import Question, RawQuestions, read_questions
from trainer.data.tokens import check_max_length
from trainer.data.windows import Windows, make_windows
from trainer.model.architecture import load_architecture, load_tokenizer
from trainer.screen import announce
from trainer.spans import best_spans, boundary_losses, count_boundaries, exact_match, span_f1
from trainer.task.protocol import Batch, Evaluation, Forward, Outputs, SplitName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 20
"""Held-out questions in the report."""
SCORE, FIRST, LAST, NO_ANSWER, LOSS, TARGETS = range(6)
"""Columns of what is noted of a window: its best stretch, in characters, the score of "no answer", and its loss."""


@dataclass(frozen=True)
class QuestionAnsweringTask:
    """Implements `Task`; see protocol.py. A sample is a window, of which a long context has several."""

    config: RunConfig
    settings: QuestionData
    tokenizer: "PreTrainedTokenizerBase"
    raw: RawQuestions
    train: Windows
    validation: Windows

    label_names = ()
    vocab_size = None
    count_names = ("correct",)
    shown_metrics = ("loss", "exact_match", "f1")
    counted, speed = "questions", "samples_per_s"
    report_split: SplitName = "validation"

    @cached_property
    def batches(self) -> GlobalBatches:
        """The order of the windows."""
        train, by_length = self.config.train, self.settings.group_by_length
        return GlobalBatches(self.train.lengths, train.global_batch_size, train.seed, group_by_length=by_length)

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.per_epoch

    def identity(self) -> dict[str, str]:
        digest, train = hashlib.sha256(), self.train
        for array in (train.tokens, train.offsets, train.labels):
            digest.update(array.tobytes())
        return {"data": digest.hexdigest()}

    def model_info(self) -> dict[str, object]:
        names = ("max_length", "stride", "max_answer_length")
        return {name: getattr(self.settings, name) for name in names} | {"no_answer": self.raw.may_have_no_answer}

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def usage(self, folder: Path) -> str:
        return f'samestep predict {quote(str(folder))} --context "your text" "your question"'

    def global_batch(self, step: int) -> np.ndarray:
        return self.batches.at(step)

    def training_batch(self, ids: np.ndarray) -> Batch:
        return self.train.batch(ids, self.padding)

    @property
    def padding(self) -> int:
        """The token that fills short windows; the attention mask hides it."""
        return int(self.tokenizer.pad_token_id or 0)

    def rank_state(self, step: int) -> bytes:
        return b""

    def restore_rank_state(self, step: int, state: bytes) -> None:
        assert not state, "samples are a function of the step"

    def model_inputs(self, batch: Batch) -> Batch:
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        return losses_of(outputs, batch).sum()

    def counts(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        return (count_boundaries(outputs.start_logits, outputs.end_logits, batch["attention_mask"], batch["labels"]),)

    def train_metrics(
        self, loss: float, num_targets: float, counts: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        return {"train/accuracy": counts["correct"] / max(num_targets, 1)}

    def evaluate(self, forward: Forward, engine: Engine, split: SplitName) -> Evaluation:
        windows, notes = self.validation, torch.zeros(len(self.validation), 6, dtype=torch.float64)
        with torch.no_grad():
            for ids in evaluation_batches(windows.lengths, self.config.train.eval_batch_size, engine.world_size):
                share = rank_share(ids, engine.rank, engine.world_size)
                batch = engine.to_device(windows.batch(share, self.padding))
                outputs = forward(self.model_inputs(batch))
                notes[torch.from_numpy(share)] = self.notes_of(outputs, batch, share)
        of_windows = engine.sum_array_over_ranks(notes).numpy()
        answers = self.answers_of(of_windows)
        right = [[text for text, _ in question.answers] for question in self.raw.validation]
        pairs = list(zip(answers, right, strict=True))
        metrics = {
            "loss": float(of_windows[:, LOSS].sum() / max(of_windows[:, TARGETS].sum(), 1)),
            "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
            "f1": float(np.mean([span_f1(*pair) for pair in pairs])),
            "count": len(pairs),
        }
        return Evaluation(metrics, {"answers": np.array(answers)})

    def notes_of(self, outputs: Outputs, batch: Batch, ids: np.ndarray) -> Tensor:
        """(B, 6) float64 of the windows `ids`, on the CPU; what a batch has beyond them is left out."""
        windows, count = self.validation, len(ids)
        start, end = outputs.start_logits[:count], outputs.end_logits[:count]
        best = best_spans(start, end, windows.inside[ids], self.settings.max_answer_length)
        first, last = windows.characters(ids, best.first, best.last)
        cls = torch.from_numpy(windows.cls[ids]).to(start.device)[:, None]
        no_answer = (start.gather(1, cls) + end.gather(1, cls)).double().cpu().numpy()[:, 0]
        losses = losses_of(outputs, batch)[:count].double().sum(dim=1).cpu().numpy()
        targets = (windows.labels[ids] != IGNORED).sum(axis=1)
        return torch.from_numpy(np.stack([best.score, first, last, no_answer, losses, targets], axis=1))

    def answers_of(self, notes: np.ndarray) -> list[str]:
        """The answer to each held-out question, whose windows stand side by side."""
        of_questions = np.split(notes, np.flatnonzero(np.diff(self.validation.questions)) + 1)
        pairs = zip(self.raw.validation, of_questions, strict=True)
        return [self.answer_of(question, of_question) for question, of_question in pairs]

    def answer_of(self, question: Question, notes: np.ndarray) -> str:
        """That of its best window; "" where "no answer" has a higher score in every window, if there are such questions."""
        best = notes[notes[:, SCORE].argmax()]
        if self.raw.may_have_no_answer and notes[:, NO_ANSWER].min() > best[SCORE]:
            return ""
        return question.context[int(best[FIRST]) : int(best[LAST])].strip()

    def generation_metrics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        return {}

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """samples.txt: held-out questions, the right answers and the model's."""
        shown = zip(self.raw.validation[:SAMPLES], evaluation.details["answers"], strict=False)
        texts = [
            f"question: {question.question}\nright:    {' | '.join(text for text, _ in question.answers)}\nanswer:   {answer}"
            for question, answer in shown
        ]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def losses_of(outputs: Outputs, batch: Batch) -> Tensor:
    """(B, 2) fp32: of the first and of the last token of each window's answer."""
    return boundary_losses(outputs.start_logits, outputs.end_logits, batch["attention_mask"], batch["labels"])


def build(config: RunConfig, accelerator: Accelerator) -> QuestionAnsweringTask:
    """Read, check, split and tokenize the questions; rank 0 says what they are."""
    data = config.data
    assert isinstance(data, QuestionData), data.kind
    raw = read_questions(data)
    tokenizer = load_tokenizer(config.model)
    positions = getattr(load_architecture(config.model, ()), "max_position_embeddings", None)
    check_max_length(data.max_length, tokenizer, pair=True, source=config.model.source, positions=positions)
    train, validation = (
        make_windows(questions, tokenizer, max_length=data.max_length, stride=data.stride)
        for questions in (raw.train, raw.validation)
    )
    task = QuestionAnsweringTask(config, data, tokenizer, raw, train, validation)
    announce(describe(task), is_main=accelerator.is_main_process)
    return task


def describe(task: QuestionAnsweringTask) -> str:
    """What the data is, for the screen before training."""
    data, raw, train = task.settings, task.raw, task.train
    held = (train.labels[:, 0] != train.cls) & (train.labels[:, 0] != IGNORED)
    lines = [
        *raw.sources,
        count_words(raw.train),
        f"{len(train):,} windows of at most {data.max_length} tokens (data.max_length) for "
        f"training, {held.mean():.0%} with the answer; {len(task.validation):,} for validation",
    ]
    lost = len(np.unique(train.questions[train.labels[:, 0] == IGNORED]))
    if lost:
        lines.append(
            f"{lost:,} answers fit no window, or have no token: their questions are not learned; raise data.stride"
        )
    too_long = int((np.diff(train.labels[held], axis=1) >= data.max_answer_length).sum())
    if too_long:
        lines.append(
            f"{too_long:,} windows have an answer of more than data.max_answer_length ({data.max_answer_length}) tokens"
        )
    return "\n".join(f"{'data' if place == 0 else '':<11}{line}" for place, line in enumerate(lines))


def count_words(questions: list[Question]) -> str:
    """How many there are to learn from, and how many of them have no answer."""
    without = sum(not question.answers for question in questions)
    words = f"{without:,} without an answer" if without else "all with an answer, so that one is always given"
    return f"{len(questions):,} questions for training, {words}"
