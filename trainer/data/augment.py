"""Other forms of a training sentence, as pure functions of (seed, epoch, sample): the same on any rank, in any process, after a resume.

The four changes of words are EDA's (arXiv 1901.11196). Texts that models wrote come from trainer/model/rewrite.py, once, before
training. Invariant: only training samples are held here.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.config.augment import WORD_KINDS, Augmentation, AugmentKind
from trainer.data.batches import permutation, random_words
from trainer.data.samples import Samples
from trainer.data.synonyms import Synonyms

Draws = NDArray[np.float64]
"""Random numbers in 0..1, without 1."""

TEXT_DRAWS, WORD_DRAWS, SHARE_DRAWS, PARTNER_DRAWS = 2, 3, 4, 5
"""Last part of a key, so that what is drawn for one purpose says nothing about another. 0 and 1 order the samples."""
WORD = re.compile(r"(\W*)(.*?)(\W*)")


@dataclass(frozen=True)
class Augmenter:
    """The training sentences and everything that their other forms are made from."""

    samples: Samples
    settings: Augmentation
    seed: int
    synonyms: Synonyms = field(default_factory=dict)
    rewrites: Mapping[AugmentKind, Sequence[tuple[str, ...]]] = field(default_factory=dict)
    """Kind -> of each sample its texts, as models rewrote them."""

    def texts_at(self, epoch: int, sample: int) -> tuple[str, ...]:
        """The text of a sample in an epoch, of a pair both: as they are, or by one of the kinds."""
        kinds = self.settings.text_kinds
        chance, place = draws(2, self.seed, epoch, sample, TEXT_DRAWS)
        if not kinds or chance >= self.settings.probability:
            return self.original(sample)
        return self.by_kind(kinds[int(place * len(kinds))], epoch, sample)

    def original(self, sample: int) -> tuple[str, ...]:
        """The text of a sample, or both texts of a pair."""
        pairs = self.samples.pairs
        return (self.samples.texts[sample], *(() if pairs is None else (pairs[sample],)))

    def by_kind(self, kind: AugmentKind, epoch: int, sample: int) -> tuple[str, ...]:
        """The same by this kind; the two texts of a pair are changed independently."""
        if kind not in WORD_KINDS:
            return self.rewrites[kind][sample]
        changed = []
        for part, text in enumerate(self.original(sample)):
            words = text.split()
            count = max(1, int(self.settings.fraction * len(words)))
            random = draws(2 * len(words) + 3 * count, self.seed, epoch, sample, part, WORD_DRAWS)
            changed.append(" ".join(self.change(kind)(words, count, random)))
        return tuple(changed)

    def change(self, kind: AugmentKind) -> Callable[[Sequence[str], int, Draws], list[str]]:
        """(words, how many to change, draws) -> other words."""
        if kind == "synonyms":
            return lambda words, count, random: replace_words(words, count, random, self.synonyms)
        if kind == "insert":
            return lambda words, count, random: insert_words(words, count, random, self.synonyms)
        return delete_words if kind == "delete" else swap_words

    def taken(self, numbers: NDArray[np.int64]) -> Samples:
        """The samples of these numbers (see `number_samples`) in their forms; the labels are the samples' own."""
        epochs, _, samples = self.places(numbers)
        texts = [self.texts_at(int(epoch), int(sample)) for epoch, sample in zip(epochs, samples, strict=True)]
        pairs = None if self.samples.pairs is None else [pair for _, pair in texts]
        return Samples([text[0] for text in texts], pairs, self.samples.labels[samples])

    def places(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(epoch, partner, sample) of each number."""
        rest, samples = np.divmod(numbers, len(self.samples))
        epochs, partners = np.divmod(rest, len(self.samples))
        return epochs, partners, samples

    def partners_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the partners, in the same epoch."""
        epochs, partners, _ = self.places(numbers)
        return number_samples(partners, partners, epochs, len(self.samples))

    def shares(self, numbers: NDArray[np.int64]) -> Draws:
        """Share of each sample in its blend with its partner, 0.5 to 1: the larger part of a draw from Beta(alpha, alpha)."""
        from scipy.special import betaincinv

        epochs, _, samples = self.places(numbers)
        keys = zip(epochs.tolist(), samples.tolist(), strict=True)
        uniform = [draws(1, self.seed, epoch, sample, SHARE_DRAWS)[0] for epoch, sample in keys]
        alpha = self.settings.mixup_alpha
        share = betaincinv(alpha, alpha, np.array(uniform))
        return np.asarray(np.maximum(share, 1 - share), np.float64)

    def digest(self) -> bytes:
        """Of the tables that texts are made from; settings and samples are known elsewhere."""
        made = hashlib.sha256()
        for word in sorted(self.synonyms):
            made.update("\t".join((word, *self.synonyms[word], "\n")).encode())
        for kind in sorted(self.rewrites):
            made.update(repr((kind, list(self.rewrites[kind]))).encode())
        return made.digest()


def describe_augmentation(settings: Augmentation) -> tuple[str, ...]:
    """What happens to training sentences, for the screen; nothing where nothing does."""
    lines = []
    if settings.text_kinds:
        lines.append(
            f"{', '.join(settings.text_kinds)}: each epoch sees {settings.probability:.0%} of the training sentences in another form"
        )
    if settings.mixes:
        lines.append(
            f"mixup: every training sentence is blended with another of its step, Beta({settings.mixup_alpha:g})"
        )
    return tuple(lines)


def number_batch(augmenter: Augmenter, batch: NDArray[np.int64], step: int, *, epoch: int) -> NDArray[np.int64]:
    """The numbers of a whole global batch's samples; where samples are blended, each with its partner."""
    partners = choose_partners(batch, augmenter.seed, step) if augmenter.settings.mixes else batch
    return number_samples(batch, partners, epoch, len(augmenter.samples))


def number_samples(
    samples: NDArray[np.int64], partners: NDArray[np.int64], epoch: int | NDArray[np.int64], num_samples: int
) -> NDArray[np.int64]:
    """One number for a sample, the partner it is blended with and the epoch, so that a batch is a function of numbers alone."""
    return (epoch * num_samples + partners) * num_samples + samples


def choose_partners(batch: NDArray[np.int64], seed: int, step: int) -> NDArray[np.int64]:
    """For each sample of a global batch another one: all stand in a random circle, and each takes the next. Alone: itself."""
    circle = permutation(len(batch), seed, step, PARTNER_DRAWS)
    partners = np.empty_like(batch)
    partners[circle] = batch[np.roll(circle, -1)]
    return partners


def draws(count: int, *key: int) -> Draws:
    """`count` random numbers that depend on `key` alone."""
    return (random_words(count, *key) >> np.uint64(11)) * 2.0**-53


def replace_words(words: Sequence[str], count: int, random: Draws, synonyms: Synonyms) -> list[str]:
    """Up to `count` words that have synonyms, replaced by one each. random: (2 x words or more,)."""
    known = known_words(words, synonyms)
    chosen = sorted(known, key=lambda place: float(random[place]))[:count]
    changed = list(words)
    for place in chosen:
        changed[place] = synonym_of(words[place], float(random[len(words) + place]), synonyms)
    return changed


def insert_words(words: Sequence[str], count: int, random: Draws, synonyms: Synonyms) -> list[str]:
    """`count` synonyms of random words put at random places; nothing where no word has one. random: (3 x count or more,)."""
    known, changed = known_words(words, synonyms), list(words)
    for word, other, place in random[: 3 * count].reshape(count, 3) if known else ():
        source = words[known[int(word * len(known))]]
        changed.insert(int(place * (len(changed) + 1)), bare(synonym_of(source, float(other), synonyms)))
    return changed


def delete_words(words: Sequence[str], count: int, random: Draws) -> list[str]:
    """Without `count` of the words; one is always left. random: (words or more,)."""
    gone = set(np.argsort(random[: len(words)], kind="stable")[: min(count, len(words) - 1)].tolist())
    return [word for place, word in enumerate(words) if place not in gone]


def swap_words(words: Sequence[str], count: int, random: Draws) -> list[str]:
    """`count` times two words at different places change places. random: (2 x count or more,)."""
    changed = list(words)
    for first, further in random[: 2 * count].reshape(count, 2) if len(words) > 1 else ():
        here = int(first * len(words))
        there = (here + 1 + int(further * (len(words) - 1))) % len(words)
        changed[here], changed[there] = changed[there], changed[here]
    return changed


def known_words(words: Sequence[str], synonyms: Synonyms) -> list[int]:
    """Places of the words that have synonyms."""
    return [place for place, word in enumerate(words) if bare(word).lower() in synonyms]


def bare(word: str) -> str:
    """A word without the punctuation around it."""
    match = WORD.fullmatch(word)
    return match.group(2) if match else word


def synonym_of(word: str, random: float, synonyms: Synonyms) -> str:
    """One of a word's synonyms, between the same punctuation, capitalized where the word is."""
    match = WORD.fullmatch(word)
    assert match is not None, word
    before, inner, after = match.groups()
    others = synonyms[inner.lower()]
    other = others[int(random * len(others))]
    return before + (other[:1].upper() + other[1:] if inner[:1].isupper() else other) + after
