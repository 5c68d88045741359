"""How training sentences are varied: the section `data.augment` of sentences with labels."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from trainer.config.section import Fraction, Section

AugmentKind = Literal["synonyms", "delete", "insert", "swap", "back_translation", "paraphrase", "mixup"]
WORD_KINDS: tuple[AugmentKind, ...] = ("synonyms", "delete", "insert", "swap")
"""Those that change single words of a text."""
MODEL_KINDS: dict[AugmentKind, tuple[str, ...]] = {
    "back_translation": ("translator", "back_translator"),
    "paraphrase": ("paraphraser",),
}
"""Those that models write -> the settings that name the models, in the order in which they read."""
TEXT_KINDS: tuple[AugmentKind, ...] = (*WORD_KINDS, *MODEL_KINDS)
"""Those that make another text of a text."""


class Augmentation(Section):
    """How training sentences are varied; sentences that a model is evaluated on never are."""

    kinds: tuple[AugmentKind, ...] = ()
    """`synonyms`, `delete`, `insert`, `swap` change words (EDA, arXiv 1901.11196); `back_translation`, `paraphrase` take a text that models
    wrote, once, before training; `mixup` blends the word embeddings and the labels of two sentences (arXiv 1905.08941). Empty: none."""
    probability: Fraction = 0.5
    """With which an epoch sees a sentence in another form: by one of the kinds, drawn anew each time. Mixup is for every sentence."""
    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of a text's words that is changed, at least one: EDA's alpha."""
    synonyms: str | None = None
    """File of lines `word TAB synonym TAB synonym ...`. None: WordNet 3.0, English."""
    paraphraser: str | None = None
    """Model that writes a text from a text (T5, BART): a local folder or a hub id."""
    paraphraser_prefix: str | None = None
    """Put before every text that it reads, such as `paraphrase: `. None: what samestep trained it with (`data.prefix`), or nothing."""
    translator: str | None = None
    """The same, from the texts' language into another."""
    translator_prefix: str | None = None
    """Before every text that it reads, such as `translate English to German: `, or `>>es<< ` of a model of several languages."""
    back_translator: str | None = None
    """The same, from that language back."""
    back_translator_prefix: str | None = None
    """Before every text that it reads."""
    mixup_alpha: Annotated[float, Field(gt=0.0, le=8.0)] = 1.0
    """A sentence's share is drawn from Beta(alpha, alpha): below 1 most blends are nearly one of the two, above 1 most are halves."""

    @model_validator(mode="after")
    def _models_are_named(self) -> Self:
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds {self.kinds} must differ from each other")
        for kind, settings in MODEL_KINDS.items():
            for setting in settings:
                if kind in self.kinds and getattr(self, setting) is None:
                    raise ValueError(f"{setting} (none) must name a model that writes texts, for {kind}; set it")
        return self

    @property
    def text_kinds(self) -> tuple[AugmentKind, ...]:
        """Those of `kinds` that make another text of a text."""
        return tuple(kind for kind in self.kinds if kind in TEXT_KINDS)

    @property
    def mixes(self) -> bool:
        """Whether sentences are blended."""
        return "mixup" in self.kinds
