"""Questions that a stretch of a text answers: what extractive question answering learns from."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import Self

from trainer.config.section import MayChange, Section


class QuestionData(Section):
    """Questions, each with a context and the stretches of it that answer."""

    kind: Literal["questions"] = "questions"
    """The kind of data."""
    source: str = "asset:stdlib"
    """`asset:stdlib`: questions about the source of Python's standard library; a SQuAD file (.json, v1 or v2); or rows of question, context
    and answers: a file (.jsonl .parquet) or hub dataset such as `rajpurkar/squad`. With a split of its own: the training split."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    validation: str | None = None
    """A file, or the name of a hub dataset's split. None: cut from the source by `validation_fraction`."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the questions held out where `validation` is None; no context, of asset:stdlib no file, is on both sides."""
    validation_rows: Annotated[PositiveInt | None, MayChange] = 512
    """Most questions of an evaluation. None: all that are held out."""
    split_seed: int = 0
    """Seed of the split; independent of `train.seed` so that seeds share one validation set."""
    max_length: Annotated[int, Field(ge=32)] = 384
    """Tokens of a window: the question, of which at most a quarter of them is read, and a part of the context."""
    stride: NonNegativeInt = 128
    """Tokens that neighbouring windows of a long context share; at most half of `max_length`."""
    max_answer_length: PositiveInt = 30
    """Most tokens of an answer that is given."""
    group_by_length: bool = True
    """Put windows of similar length into one global batch: less padding. Off: a plain shuffle."""

    @model_validator(mode="after")
    def _windows_move_on(self) -> Self:
        if self.stride > self.max_length // 2:
            raise ValueError(
                f"stride ({self.stride}) must be at most {self.max_length // 2}, half of max_length ({self.max_length}), so that every "
                "window brings something new; lower it"
            )
        return self
