"""What `samestep predict` needs of a task: texts in, an answer for each out. The table OPENERS says which module does it."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What the model says of one text."""

    words: str
    """The line on the screen."""
    facts: dict[str, object]
    """The JSON line; `text` comes first."""


@dataclass(frozen=True)
class PredictOptions:
    """How to answer; a task reads what concerns it."""

    batch_size: int = 32
    top_k: int = 5
    """Candidates for each mask."""
    new_tokens: int = 128
    """Most tokens of a generated text."""
    num_beams: int = 1
    """Above 1: beam search."""
    temperature: float | None = None
    """Sample at this temperature. None: greedy, or beams."""
    seed: int = 0
    """Of sampling."""
    context: str | None = None
    """The text that questions are answered from."""


class Answerer(Protocol):
    """A model that is ready to answer. Local to one process."""

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """An answer for each text, in their order; batched, sorted by length. DataError for a text that cannot be answered."""


OPENERS: dict[str, str] = {
    "mlm": "trainer.predict.fill_mask:open_answerer",
    "mlm_pairs": "trainer.predict.fill_mask:open_answerer",
    "clm": "trainer.predict.generate:open_answerer",
    "seq2seq": "trainer.predict.generate:open_answerer",
    "token_classification": "trainer.predict.tags:open_answerer",
    "question_answering": "trainer.predict.questions:open_answerer",
}
"""Task -> its `open_answerer(model, tokenizer, info, options)`, imported at need; info is samestep.json, or {} for a model source."""


def open_answerer(
    task: str,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    info: Mapping[str, Any],
    options: PredictOptions,
) -> Answerer:
    """The answerer of a task, with its model on the accelerator where there is one."""
    module, _, name = OPENERS[task].partition(":")
    return cast(Answerer, getattr(importlib.import_module(module), name)(model, tokenizer, info, options))
