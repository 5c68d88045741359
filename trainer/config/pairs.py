"""Texts that are made from texts, such as summaries and translations: the data of model.task=seq2seq."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from trainer.config.section import MayChange, Section


class PairData(Section):
    """Texts, and the text that a model should make of each."""

    kind: Literal["pairs"] = "pairs"
    """The kind of data."""
    source: str = "asset:stdlib"
    """A file (.csv .tsv .jsonl .parquet), a hub dataset, or asset:stdlib: Python functions and the first line of their docstrings."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    text: str = "text"
    """Column of the text."""
    target: str = "target"
    """Column of what is made of it."""
    prefix: str | None = None
    """Put before every text, in prediction too, such as `summarize: ` for T5. None: nothing."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the texts that is held out for validation; equal texts are held out together."""
    validation_rows: Annotated[PositiveInt | None, MayChange] = 256
    """Most texts of an evaluation. None: all that are held out."""
    split_seed: int = 0
    """Seed of the split; independent of `train.seed` so that seeds share one validation set."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a text, prefix and end included; longer ones are cut, and the share that was cut is printed."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """The same for a target."""
    group_by_length: bool = True
    """Put pairs of similar length into one global batch: less padding. Off: a plain shuffle."""
    generate: Annotated[NonNegativeInt, MayChange] = 32
    """Held-out texts that the exported model answers at the end: how near it comes to their targets. 0: none."""
    new_tokens: Annotated[PositiveInt, MayChange] = 128
    """Most tokens of such an answer."""
    num_beams: Annotated[PositiveInt, MayChange] = 1
    """Beams that such an answer is searched with. 1: the likeliest token each time."""
