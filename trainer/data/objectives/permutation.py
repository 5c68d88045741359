"""XLNet's permutation language modelling (Yang et al., arXiv 1906.08237): spans are predicted in a random order.

A predicted token sees the text that is not predicted and the predicted tokens before it in that order. As in transformers'
DataCollatorForPermutationLanguageModeling, spans of 1 to 5 tokens are predicted, each in a context of 6 times its length; but the model is
given the predicted tokens themselves, which later ones may see, as in the paper, and not mask tokens; and special tokens see no predicted
token, through which earlier ones could have seen later ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import IGNORED
from trainer.data.objectives.rows import Batch, Ids, Rows, Vocabulary, random_rows

SPANS, CONTEXTS, ORDER = 21, 22, 23  # keys of the random words


@dataclass(frozen=True)
class Permutation:
    """Rows, what is predicted, and in which order; trainer/task/objective.py makes the masks of it, on the model's device."""

    vocabulary: Vocabulary
    length: int
    """Tokens of a row, the frame included."""
    seed: int
    fraction: float
    max_span: int

    def batch(self, rows: Rows) -> Batch:
        """input_ids, order (B, T): place of a predicted token, -1 of any other; targets, labels (B, P): where they are and what.

        A row ends with end and start, as XLNet's do. attention_mask where a row has padding. P: the most targets of a row.
        """
        width = rows.ids.shape[1]
        ids = np.full((len(rows.ids), self.length), self.vocabulary.pad)
        ids[:, :width] = np.where(rows.is_token, rows.ids, self.vocabulary.pad)
        row = np.arange(len(ids))
        ids[row, rows.held], ids[row, rows.held + 1] = self.vocabulary.end, self.vocabulary.start
        is_text = np.zeros(ids.shape, np.bool_)
        is_text[:, :width] = rows.is_token & ~self.vocabulary.is_special[ids[:, :width]]
        chosen = is_text & self.spans(rows.samples)
        words = random_rows(rows.samples, self.length, self.seed, ORDER)
        order = np.where(chosen, np.argsort(np.argsort(words, axis=1), axis=1), -1)
        targets, labels = targets_of(chosen, ids)
        batch = {"input_ids": ids, "order": order, "targets": targets, "labels": labels}
        is_token = np.arange(self.length) < rows.held[:, None] + 2
        return batch if is_token.all() else batch | {"attention_mask": is_token.astype(np.int64)}

    def spans(self, samples: Ids) -> NDArray[np.bool_]:
        """(B, T) spans of 1 to max_span tokens, each somewhere in a context of its length / fraction."""
        most = int(self.length * self.fraction) + 2
        sizes = 1 + (random_rows(samples, most, self.seed, SPANS) % np.uint64(self.max_span)).astype(np.int64)
        contexts = (sizes / self.fraction).astype(np.int64)
        room = (contexts - sizes + 1).astype(np.uint64)
        before = np.cumsum(contexts, axis=1) - contexts
        starts = before + (random_rows(samples, most, self.seed, CONTEXTS) % room).astype(np.int64)
        change = np.zeros((len(samples), self.length + 1), np.int8)
        row = np.broadcast_to(np.arange(len(samples))[:, None], starts.shape)
        for places, step in ((starts, 1), (starts + sizes, -1)):
            np.add.at(change, (row, np.minimum(places, self.length)), step)
        return np.cumsum(change[:, : self.length], axis=1) > 0


def targets_of(chosen: NDArray[np.bool_], ids: Ids) -> tuple[Ids, Ids]:
    """(B, P) positions of the predicted tokens, -1 behind the last; (B, P) the tokens, -100 behind."""
    counts = chosen.sum(axis=1)
    places = np.argsort(~chosen, axis=1, kind="stable")[:, : max(int(counts.max(initial=0)), 1)]
    exists = np.arange(places.shape[1]) < counts[:, None]
    return np.where(exists, places, -1), np.where(exists, np.take_along_axis(ids, places, axis=1), IGNORED)
