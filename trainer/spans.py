"""Answers as stretches of a context: their loss, the best one of a window and of a question, and how near it comes.

Place in the flow: trainer/task/question_answering.py and trainer/predict/questions.py ask here. The scores are those of SQuAD's official
script: where v1.1 and v2.0 differ, for answers of nothing but punctuation and articles, v2.0's. Local to the rank: no collective.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batches import IGNORED

PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Spans:
    """The best stretch of each window; all (B,), on the CPU."""

    score: NDArray[np.float64]
    """Start logit + end logit; minus infinity where the window has no token of the context."""
    first: NDArray[np.int64]
    """Its first token."""
    last: NDArray[np.int64]
    """Its last token."""
    log_total: NDArray[np.float64]
    """Logarithm of the sum of exp(score) over all stretches of the window."""


def boundary_losses(start: Tensor, end: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the first and of the last token of answers, in fp32.

    start, end: (B, T) logits of any float dtype; mask: (B, T), 0 where padded, which no probability goes to, so that the loss does not
    depend on how far a batch is padded; labels: (B, 2) int64, -100 where not a target. Returns (B, 2) fp32, 0.0 where no target.
    """
    logits = torch.stack([start, end], dim=1).float().masked_fill(mask[:, None] == 0, -torch.inf)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


def count_boundaries(start: Tensor, end: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """How many targets have their highest logit at the label: a scalar, int64. Shapes as above."""
    logits = torch.stack([start, end], dim=1).masked_fill(mask[:, None] == 0, -torch.inf)
    return (logits.argmax(dim=-1) == labels).sum()


def best_spans(start: Tensor, end: Tensor, inside: NDArray[np.int64], max_answer_length: int) -> Spans:
    """The best stretch of at most so many tokens of the context.

    start, end: (B, T) logits of any float dtype; inside: (B, 2) first and last + 1 token of the context.
    """
    columns = torch.arange(start.shape[1], device=start.device)
    edges = torch.from_numpy(inside).to(start.device)
    outside = (columns < edges[:, :1]) | (columns >= edges[:, 1:])
    starts = start.double().masked_fill(outside, -torch.inf)
    ends = end.double().masked_fill(outside, -torch.inf)
    padded = torch.nn.functional.pad(ends, (0, max_answer_length - 1), value=-torch.inf)
    scores = (starts[:, :, None] + padded.unfold(1, max_answer_length, 1)).flatten(1)  # (B, T * L)
    best, place = scores.max(dim=1)
    first = place // max_answer_length
    found = best, first, first + place % max_answer_length, scores.logsumexp(dim=1)
    score, first_token, last_token, log_total = (tensor.cpu().numpy() for tensor in found)
    return Spans(score, first_token, last_token, log_total)


def normalized(answer: str) -> str:
    """In lower case, without punctuation, articles and further white space, as SQuAD's script compares answers."""
    plain = re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(PUNCTUATION))
    return " ".join(plain.split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, to `normalized`; without any, where it is empty."""
    return float(any(normalized(answer) == normalized(one) for one in right_answers(right)))


def span_f1(answer: str, right: Sequence[str]) -> float:
    """The highest F1 of words with one of the right answers; where either has no word, whether both have none."""
    return max(f1_of_words(normalized(answer).split(), normalized(one).split()) for one in right_answers(right))


def right_answers(right: Sequence[str]) -> Sequence[str]:
    """Those with something to compare; the empty answer where there is none, as in SQuAD's script."""
    return [one for one in right if normalized(one)] or [""]


def f1_of_words(answer: Sequence[str], right: Sequence[str]) -> float:
    """Of two bags of words."""
    if not answer or not right:
        return float(list(answer) == list(right))
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right))
