"""Words with a tag each: what token classification (named entities) learns from."""

from typing import Literal

from pydantic import PositiveInt, model_validator
from typing_extensions import Self

from trainer.config.section import Fraction, Section


class TagData(Section):
    """Sentences as words, each with a BIO tag: B-X begins an entity of type X, I-X goes on with it, O is none."""

    kind: Literal["tags"] = "tags"
    """The kind of data."""
    source: str = "asset:stdlib"
    """`asset:stdlib`: names in the source of Python's standard library; a CoNLL file (.conll .bio .iob .txt: a word and its tag a line, a
    blank line between sentences); or rows of two lists, words and tags: a file (.jsonl .parquet) or hub dataset. With a split of its
    own: the training split."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    validation: str | None = None
    """A file, or the name of a hub dataset's split. None: cut from the source by `validation_fraction`."""
    test: str | None = None
    """A file, or the name of a hub dataset's split. None: cut from the source by `test_fraction`."""
    words: str = "tokens"
    """Column of the words, for rows."""
    tags: str = "ner_tags"
    """Column of the tags, for rows; names, or class ids where a hub dataset names them."""
    word_column: int = 0
    """Column of the word in a CoNLL file, from 0."""
    tag_column: int = -1
    """Column of the tag in a CoNLL file; -1 is the last."""
    labels: tuple[str, ...] | None = None
    """Types of entities, in the order of class ids. None: the sorted types of the source. A type outside is an error."""
    validation_fraction: Fraction = 0.1
    """Share of the documents (without marks of documents: sentences) held out for validation, where `validation` is None."""
    test_fraction: Fraction = 0.1
    """Share held out for the test, where `test` is None. 0: no test."""
    split_seed: int = 0
    """Seed of the split; independent of `train.seed` so that seeds share one test set."""
    max_length: PositiveInt = 128
    """Tokens; longer sentences are cut between words, and all parts are used."""
    group_by_length: bool = True
    """Put sentences of similar length into one global batch: less padding. Off: a plain shuffle."""

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        held_out = (0 if self.validation else self.validation_fraction) + (0 if self.test else self.test_fraction)
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction ({held_out:g}) must be below 1; nothing would be left to train on"
            )
        if not self.validation and self.validation_fraction == 0:
            raise ValueError("validation_fraction (0) must be above 0 where no validation split is named")
        return self
