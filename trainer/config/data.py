"""The kinds of data: what is learned. Which kind a task needs stands in run.py."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from trainer.config.augment import Augmentation
from trainer.config.section import Fraction, MayChange, Probability, Section

Target = Literal["single", "multi", "regression"]
"""What a text's label is: one class, several, a number."""


class ClassificationData(Section):
    """Sentences or sentence pairs with one label each, several labels, or a number."""

    kind: Literal["classification"] = "classification"
    """The kind of data."""
    source: str = "asset:sst"
    """`asset:NAME`, a file (.csv .tsv .jsonl .parquet), or a hub dataset id. With a split of its own: the training split."""
    subset: str | None = None
    """Configuration name of a hub dataset, such as `sst2` of `nyu-mll/glue`."""
    validation: str | None = None
    """A file, or the name of a hub dataset's split. None: cut from the source by `validation_fraction`."""
    test: str | None = None
    """A file, or the name of a hub dataset's split. None: cut from the source by `test_fraction`."""
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text, for sentence pairs."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] | None = None
    """The label set, in the order of class ids. None: the sorted labels found in the source. A label outside is a bad row."""
    target: Target = "single"
    """`single`: one label for each text. `multi`: any number of labels, a list (JSONL, Parquet) or a text with `label_separator`; the loss
    is the binary cross-entropy averaged over labels. `regression`: a number; the loss is the squared error."""
    label_separator: Annotated[str, Field(min_length=1)] = ","
    """Between the labels of a text cell, for target=multi. An empty list says that no label holds; an empty cell is a missing label."""
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    """Factor of each label's loss, in the order of class ids; the sum is still divided by the number of examples, not by that of the
    weights. `balanced`: N / (C * count) of the training split, as scikit-learn; for target=multi the factor is of the examples that have
    the label (torch's pos_weight), and `balanced` is their number against the others'. None: all 1."""
    label_smoothing: Probability = 0.0
    """Share of each target that is spread over all classes (arXiv 1512.00567), for target=single. Like the class weights, it is part of
    the evaluation loss too, as with transformers' Trainer."""
    validation_fraction: Fraction = 0.15
    """Share of the source held out for validation, stratified by label, where `validation` is None."""
    test_fraction: Fraction = 0.15
    """Share of the source held out for the test, stratified by label, where `test` is None. 0: no test."""
    split_seed: int = 0
    """Seed of the stratified split; independent of `train.seed` so that seeds share one test set."""
    max_length: PositiveInt = 128
    """Tokens; longer texts are cut, and the share that was cut is printed."""
    max_bad_fraction: Fraction = 0.0
    """Share of bad rows (no label, empty text, unknown label, wrong type) that is dropped with a report; more is an error."""
    group_by_length: bool = True
    """Put sentences of similar length into one global batch: less padding. Off: a plain shuffle."""
    augment: Augmentation = Augmentation()
    """How training sentences are varied."""

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        held_out = (0 if self.validation else self.validation_fraction) + (0 if self.test else self.test_fraction)
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction ({held_out:g}) must be below 1; nothing would be left to train on"
            )
        if not self.validation and self.validation_fraction == 0:
            raise ValueError("validation_fraction (0) must be above 0 where no validation split is named")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels {self.labels} must differ from each other")
        if self.labels is not None and len(self.labels) < 2:
            raise ValueError(f"labels {self.labels} must name at least two classes")
        if self.augment.mixes and self.text_pair is not None:
            raise ValueError(
                f"text_pair ({self.text_pair}) does not go with mixup, which blends single texts; set it to none"
            )
        return self

    @model_validator(mode="after")
    def _settings_fit_the_target(self) -> Self:
        if self.label_smoothing > 0 and self.target != "single":
            raise ValueError(
                f"label_smoothing ({self.label_smoothing:g}) spreads one target over all classes, which target={self.target} has not; "
                "set data.label_smoothing=0"
            )
        if self.target == "regression":
            for name in ("labels", "class_weights"):
                value = getattr(self, name)
                if value is not None:
                    shown = value if isinstance(value, str) else ", ".join(map(str, value))
                    raise ValueError(
                        f"{name} ({shown}) is of classes, and target=regression has none; set data.{name}=none"
                    )
        if isinstance(self.class_weights, tuple) and min(self.class_weights, default=0.0) < 0:
            raise ValueError(
                f"class_weights ({min(self.class_weights):g}) must not be below 0; give factors such as 0.5,2"
            )
        if self.labels is not None and isinstance(self.class_weights, tuple):
            check_weights(self.class_weights, self.labels)
        return self


def check_weights(weights: tuple[float, ...], labels: tuple[str, ...]) -> None:
    """ValueError unless there is a weight for each label."""
    if len(weights) != len(labels):
        raise ValueError(
            f"class_weights ({', '.join(f'{weight:g}' for weight in weights)}) must be one for each of the {len(labels)} labels: "
            f"{', '.join(labels[:20])}; give {len(labels)} numbers in this order, or balanced"
        )


ObjectiveName = Literal["clm", "mlm", "mlm_nsp", "mlm_sop", "span_corruption", "infilling", "plm"]
TASK_OF_OBJECTIVE: dict[str, str] = {
    "clm": "clm",
    "mlm": "mlm",
    "mlm_nsp": "mlm_pairs",
    "mlm_sop": "mlm_pairs",
    "span_corruption": "seq2seq",
    "infilling": "seq2seq",
    "plm": "plm",
}
"""data.objective -> the model.task that can learn it."""


MOST_INFILLED = 0.4
"""Above it spans of random length would often meet the half of a row that infilling leaves."""


class StreamData(Section):
    """Token datasets, as `samestep data tokenize` or `adopt` make them, packed into rows and mixed by weight."""

    kind: Literal["stream"] = "stream"
    """The kind of data."""
    objective: ObjectiveName = "clm"
    """What is learned of a row: the next token (clm); masked tokens as BERT's (mlm), jointly with whether a text follows another (mlm_nsp)
    or the order of two (mlm_sop); T5's span_corruption; BART's infilling; XLNet's permuted order (plm)."""
    noise_fraction: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    """Share of the tokens that is masked, corrupted or permuted. None: the paper's: 0.15; infilling 0.3; plm 1/6."""
    mean_span: Annotated[float, Field(ge=1.0)] = 3.0
    """Mean length of the spans of span_corruption and infilling, tokens."""
    whole_words: bool = False
    """Mask all tokens of a word or none, for masked tokens."""
    sources: Annotated[tuple[str, ...], MayChange] = ("asset:stdlib",)
    """Folders or URLs of token datasets, all made with one tokenizer; `asset:stdlib` is the running Python's standard library."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Share of the rows from each source, in any unit. None: as many as each has, so that one epoch reads every row once."""
    later_weights: tuple[str, ...] = ()
    """Other weights from a sample on, as `SAMPLE:WEIGHT/WEIGHT`, such as `100000:1/3` for two sources."""
    validation: Annotated[str, MayChange] = "asset:stdlib-validation"
    """The token dataset that is evaluated, in its own order."""
    validation_rows: Annotated[PositiveInt | None, MayChange] = 256
    """Most rows of an evaluation. None: all."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a row."""
    packing: Literal["best_fit", "concat"] = "best_fit"
    """`best_fit` cuts no document that fits a row (arXiv 2404.10830); `concat` cuts the concatenation of all."""
    isolate: bool = True
    """Documents of a row do not see each other: attention and positions start anew with each."""
    max_epochs: Annotated[PositiveFloat, MayChange] = 1.0
    """Most passes over any source; a run that needs more is refused."""
    shuffle_window: PositiveInt = 8
    """Shards whose rows are shuffled together."""
    cache: Annotated[Path | None, MayChange] = None
    """Folder for packing plans and downloaded shards. None: in samestep's cache."""
    cache_gb: Annotated[PositiveFloat, MayChange] = 50.0
    """Most disk space of downloaded shards."""

    @model_validator(mode="after")
    def _weights_fit_the_sources(self) -> Self:
        if not self.sources:
            raise ValueError("sources () must name at least one token dataset")
        if self.objective != "clm" and self.isolate:
            raise ValueError(
                f"isolate (true) works with objective=clm only, and objective is {self.objective}, whose models see a whole row; set "
                "isolate=false"
            )
        if self.objective == "infilling" and (self.noise_fraction or 0) > MOST_INFILLED:
            raise ValueError(
                f"noise_fraction ({self.noise_fraction}) must be at most {MOST_INFILLED} for objective=infilling, which never takes more "
                "than half of a row away; lower it, or take objective=span_corruption"
            )
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise ValueError(f"weights {self.weights} must be as many as sources {self.sources}")
        return self


Gate = Literal[
    "no_target", "no_stop", "two_bos", "prompt_learned", "straddle", "special_token", "padding", "truncated", "template"
]
"""What is looked for in the whole set before training (trainer/data/gate.py)."""


class InstructData(Section):
    """Conversations, of which the answers are learned."""

    kind: Literal["instruct"] = "instruct"
    """The kind of data."""
    source: str = "asset:stdlib"
    """A file (.csv .tsv .jsonl .parquet), a hub dataset, or asset:stdlib: Python functions and their docstrings."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "pairs"] = "auto"
    """How conversations are written down: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's instruction, input and output, or a
    prompt and a response. `auto` goes by the columns that are there, and says what it found."""
    prompt: str = "prompt"
    """Column of the prompt, for pairs."""
    response: str = "response"
    """Column of the response, for pairs."""
    template: str = "auto"
    """alpaca, chatml, llama2, llama3, mistral, gemma, zephyr, phi, plain, or a YAML file (trainer/data/templates.py). `auto`: the model's
    own, or alpaca where it has none."""
    system: str | None = None
    """System text of conversations without one. None: none, or what the template says."""
    few_shot: NonNegativeInt = 0
    """First conversations of the source that stand as examples before every other one; they are not learned."""
    learn: Literal["answers", "last", "everything"] = "answers"
    """Targets: every answer, the last answer, or all tokens, prompts included. The end of an answer is always one."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the conversations that is held out for validation."""
    validation_rows: Annotated[PositiveInt | None, MayChange] = 256
    """Most conversations of an evaluation. None: all that are held out."""
    split_seed: int = 0
    """Seed of the split; independent of `train.seed` so that seeds share one validation set."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens; longer conversations are cut behind the last answer that fits, or left out, and counted."""
    packing: Literal["none", "best_fit"] = "none"
    """`best_fit` puts several conversations into a row of max_length tokens, where they do not see each other."""
    group_by_length: bool = True
    """Put rows of similar length into one global batch: less padding. Off: a plain shuffle."""
    generate: Annotated[NonNegativeInt, MayChange] = 32
    """Held-out prompts that the exported model answers at the end: how often it stops, and how near it comes. 0: none."""
    new_tokens: Annotated[PositiveInt, MayChange] = 128
    """Most tokens of such an answer."""
    allow: tuple[Gate, ...] = ()
    """Mistakes in the data that are said and not refused."""

    @model_validator(mode="after")
    def _format_fits_the_source(self) -> Self:
        if self.source == "asset:stdlib" and self.format not in ("auto", "pairs"):
            raise ValueError(
                f"format ({self.format}) has no effect with source=asset:stdlib, which holds pairs; set format=auto, or give a file"
            )
        return self


class LiveData(Section):
    """Text that is tokenized and packed while training reads it. Resumes on the same number of processes only."""

    kind: Literal["live"] = "live"
    """The kind of data."""
    source: str = "asset:stdlib"
    """Files, a folder, a pattern, a hub dataset, or asset:stdlib; read in its own order, each rank a part."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    column: str = "text"
    """The text column."""
    validation_rows: PositiveInt = 64
    """Rows of the first documents, which are held out."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a row; documents are concatenated and cut."""
    isolate: bool = True
    """Documents of a row do not see each other: attention and positions start anew with each."""
    max_epochs: Annotated[PositiveFloat, MayChange] = 1.0
    """Most passes over a rank's part; more is an error."""
