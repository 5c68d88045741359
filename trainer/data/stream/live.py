"""Text that is tokenized and packed while training reads it, for those who will not tokenize ahead.

Every rank takes every so-manieth document of a streaming Hugging Face dataset, in the order of the files, and cuts the tokens into rows;
the others it reads over. Such a stream can only go on where it was: its state belongs to one number of ranks. Token datasets (reader.py)
know no such limit. Local to the rank.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import LiveData
from trainer.data.batches import IGNORED
from trainer.data.stream.documents import format_of, list_files, reason, text_of
from trainer.errors import DataError

Rows = dict[str, NDArray[np.int64]]


def open_dataset(data: LiveData) -> Any:
    """The stream of examples. DataError where it cannot be opened or has no such column."""

    files = list_files(data.source)
    try:
        found = open_files(files) if files is not None else open_hub(data)
        first = next(iter(found), None)
    except Exception as error:  # of any builder behind datasets
        raise DataError(f"data.source ({data.source}) cannot be streamed: {reason(error)}") from None
    if first is None:
        raise DataError(f"data.source ({data.source}) holds no document")
    if data.column not in first or not isinstance(first[data.column], str | None):
        raise DataError(
            f"data.column ({data.column}) is no text column of {data.source}, which has {', '.join(first)}; name one"
        )
    return found


def open_hub(data: LiveData) -> Any:
    """A hub dataset, or one saved to disk."""
    import datasets

    return datasets.load_dataset(data.source, data.subset, split=data.split, streaming=True)


def open_files(files: list[Path]) -> Any:
    """Local files of one kind as a stream."""
    import datasets

    kinds = {format_of(file) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{files[0]} and the others are of several kinds ({', '.join(sorted(kinds))}); give one kind")
    (kind,) = kinds
    options = {"sample_by": "document"} if kind == "text" else {}
    return datasets.load_dataset(
        kind, data_files=[str(file) for file in files], split="train", streaming=True, **options
    )


class LiveRows:
    """Rows of tokens from a stream of documents, and a state to go on from."""

    def __init__(self, dataset: Any, tokenizer: Any, data: LiveData) -> None:
        """dataset: this rank's part. tokenizer: transformers'; its end-of-text token ends every document."""
        self.dataset, self.tokenizer, self.data = dataset, tokenizer, data
        self.epoch, self.num_documents = 0, 0
        self.tokens: list[int] = []
        self.starts: list[int] = []
        """Places in `tokens` where documents start; the rest of one that was cut starts at 0."""
        self.examples: Iterator[Any] = iter(dataset)

    def take(self, count: int) -> Rows:
        """The next `count` rows: input_ids, labels, position_ids, (count, T) int64, and num_tokens, as reader.Stream.batch gives them."""
        length = self.data.sequence_length
        rows: Rows = {name: np.zeros((count, length), np.int64) for name in ("input_ids", "position_ids")}
        rows |= {"labels": np.full((count, length), IGNORED), "num_tokens": np.full(count, length)}
        for number in range(count):
            while len(self.tokens) < length:
                self.read_document()
            self.fill(rows, number)
        return rows

    def fill(self, rows: Rows, number: int) -> None:
        """Cut one row off the tokens at hand."""
        length = self.data.sequence_length
        ids = np.array(self.tokens[:length])
        starts = sorted({0, *(start for start in self.starts if start < length)})
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            rows["labels"][number, start : end - 1] = ids[start + 1 : end]
            rows["position_ids"][number, start:end] = np.arange(end - start)
        rows["input_ids"][number] = ids
        self.tokens = self.tokens[length:]
        self.starts = [start - length for start in self.starts if start >= length]

    def read_document(self) -> None:
        """Append the next document's tokens. DataError for one that is no text, and after `data.max_epochs` passes."""
        try:
            example = next(self.examples, None)
        except Exception as error:  # of any builder or network library behind datasets
            raise DataError(
                f"data.source ({self.data.source}) cannot be read on after {self.num_documents:,} documents of this rank: {reason(error)}"
            ) from None
        if example is None:
            self.epoch += 1
            if self.epoch >= self.data.max_epochs:
                raise DataError(
                    f"data.source ({self.data.source}) is read to its end after {self.num_documents:,} documents of this rank; raise "
                    f"data.max_epochs ({self.data.max_epochs:g}) or train fewer steps"
                )
            self.dataset.set_epoch(self.epoch)
            self.examples = iter(self.dataset)
            return
        self.num_documents += 1
        place = f"data.source ({self.data.source}), document {self.num_documents:,} of this rank"
        text = text_of(example, self.data.column, place)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.starts.append(len(self.tokens))
        self.tokens += [*ids, self.tokenizer.eos_token_id]

    def state(self) -> dict[str, Any]:
        """What `restore` takes; JSON."""
        return copy.deepcopy(
            {
                "dataset": self.dataset.state_dict(),
                "epoch": self.epoch,
                "num_documents": self.num_documents,
                "tokens": self.tokens,
                "starts": self.starts,
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of this rank."""
        state = json.loads(json.dumps(state))
        self.epoch, self.num_documents = state["epoch"], state["num_documents"]
        self.tokens, self.starts = state["tokens"], state["starts"]
        self.dataset.set_epoch(self.epoch)
        self.dataset.load_state_dict(state["dataset"])
        self.examples = iter(self.dataset)
