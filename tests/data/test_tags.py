"""Words with tags: read from every format, checked, split by document, aligned with tokens; and the names of the standard library."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.tiny import tiny_bert
from trainer.config import TagData
from trainer.data.assets import asset_path
from trainer.data.batches import IGNORED
from trainer.data.names import DOCUMENT, lines_of, names_file
from trainer.data.tagged import tokenize_tagged
from trainer.data.tags import Sentence, read_tags, rows_of
from trainer.errors import ConfigError, DataError

GOOD = [("Ada", "B-PERSON"), ("Lovelace", "I-PERSON"), ("saw", "O"), ("London", "B-PLACE")]


def conll(path: Path, sentences: list[list[tuple[str, str]]], *, documents: bool = False) -> Path:
    text = "".join(
        (f"{DOCUMENT} O\n\n" if documents else "") + "".join(f"{w} {t}\n" for w, t in s) + "\n" for s in sentences
    )
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, **settings: Any) -> Any:
    return read_tags(TagData(**({"source": str(path), "validation_fraction": 0.2, "test_fraction": 0.2} | settings)))


def test_a_conll_file_and_rows_say_the_same(tmp_path: Path) -> None:
    sentences = [[*GOOD, (f"word{number}", "O")] for number in range(10)]
    one = read(conll(tmp_path / "data.conll", sentences))
    rows = [{"tokens": [w for w, _ in s], "ner_tags": [t for _, t in s]} for s in sentences]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    two = read(tmp_path / "data.jsonl")
    for part in ("train", "validation", "test"):
        assert [(s.words, s.tags) for s in getattr(one, part)] == [(s.words, s.tags) for s in getattr(two, part)]
    assert one.tag_names == ("O", "B-PERSON", "I-PERSON", "B-PLACE", "I-PLACE")
    assert [len(one.train), len(one.validation), len(one.test)] == [6, 2, 2]


def test_documents_stay_on_one_side(tmp_path: Path) -> None:
    file = tmp_path / "data.conll"
    text = "".join(f"{DOCUMENT} O\n\n" + f"doc{number} B-X\n\n" * 3 for number in range(10))
    file.write_text(text)
    raw = read(file)
    sides = [{s.words[0] for s in part} for part in (raw.train, raw.validation, raw.test)]
    assert [len(side) for side in sides] == [6, 2, 2]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("Ada B-P\nL I-Q\n", r"data.conll:2: I-Q of 'L' follows B-P; an entity begins with B-Q"),
        ("Ada O\nL I-P\n", r"data.conll:2: I-P of 'L' follows O; an entity begins with B-P"),
        ("Ada I-P\n", r"data.conll:1: I-P of 'Ada' follows O"),
        ("Ada X-P\n", r"data.conll:1: tag 'X-P' of 'Ada' must be O, B-TYPE or I-TYPE; convert"),
        ("Ada B-P\nL x O\n", r"data.conll:2: 3 columns, and the first line has 2"),
        ("Ada\n", r"data.conll:1: 1 columns"),
        ("Ada O\n\nL O\n", "all of its tags are O"),
    ],
)
def test_broken_tags_and_columns_are_refused_with_their_line(tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "data.conll"
    file.write_text(lines)
    with pytest.raises(DataError, match=message):
        read(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"word_column": 5}, r"data.word_column \(5\): .*data.conll:1 has 2 columns, 0 to 1; name one of them"),
        ({"tag_column": -3}, r"data.tag_column \(-3\): .* has 2 columns"),
        ({"tag_column": 0}, r"data.tag_column \(0\) is the column of the words at .*data.conll:1"),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(conll(tmp_path / "data.conll", [GOOD]), **settings)


def test_the_setting_that_names_a_broken_file_is_named(tmp_path: Path) -> None:
    good = conll(tmp_path / "data.conll", [GOOD] * 10)
    broken = conll(tmp_path / "held-out.conll", [[("Ada", "")]])
    with pytest.raises(DataError, match=r"data.validation \(.*held-out.conll\): 1 mistakes"):
        read(good, validation=str(broken))


def test_all_mistakes_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    file = tmp_path / "data.conll"
    file.write_text("a I-X\n\n" * 9)
    with pytest.raises(DataError) as refused:
        read(file)
    assert "9 mistakes" in str(refused.value)
    assert str(refused.value).count("an entity begins with B-X") == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "must be lists of one length, not 2 and 1"),
        ({"tokens": "a b", "ner_tags": ["O"]}, "must be lists of one length, not str and 1"),
        ({"tokens": ["a"], "ner_tags": [3]}, "tags must be names such as B-PERSON, not class ids"),
        ({"tokens": ["a", None], "ner_tags": ["O", "O"]}, r"data\.jsonl:1: words must be text, not None"),
        ({"tokens": ["a", "\ud83d"], "ner_tags": ["O", "O"]}, r"data\.jsonl:1: a word holds half of a surrogate pair"),
        ({"tokens": ["a", 7], "ner_tags": ["O", "O"]}, "words must be text, not 7"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.jsonl")


@pytest.mark.parametrize("tag", [-1, -100, 3, None, "O", 1.0])
def test_a_class_id_without_a_name_is_refused_with_its_place(tag: Any) -> None:
    names = ("O", "B-X", "I-X")
    (good,) = rows_of([["a", "b"]], [[0, 1]], ["hub row 1"], setting="data.source", names=names)
    assert good.tags == ("O", "B-X")
    with pytest.raises(DataError, match=rf"hub row 2: tags must be class ids, 0 to 2, not {re.escape(repr(tag))}"):
        rows_of([["a"], ["a", "b"]], [[1], [0, tag]], ["hub row 1", "hub row 2"], setting="data.source", names=names)


def test_a_type_outside_the_labels_is_refused(tmp_path: Path) -> None:
    file = conll(tmp_path / "data.conll", [GOOD] * 10)
    with pytest.raises(
        DataError, match=r"data.conll:4: B-PLACE is of no known type; the types are PERSON: data.labels"
    ):
        read(file, labels=("PERSON",))


def test_too_few_documents_to_hold_some_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.test_fraction \(0.2\) of 1 document\(s\) leaves none for test"):
        read(conll(tmp_path / "data.conll", [GOOD]))


# Tokens


def test_a_label_stands_at_the_first_token_of_its_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset_path("minilm"))
    sentence = Sentence(("hepatosplenomegaly", "in", "London"), ("B-X", "O", "B-Y"), 0)
    made = tokenize_tagged([sentence], ("O", "B-X", "I-X", "B-Y", "I-Y"), tokenizer, 32)
    tokens = tokenizer.convert_ids_to_tokens(made.tokens.tolist())
    labels = made.labels.tolist()
    assert tokens[:3] == ["[CLS]", "he", "##pa"]
    assert labels[:3] == [IGNORED, 1, IGNORED]
    assert [(t, label) for t, label in zip(tokens, labels, strict=True) if label != IGNORED] == [
        ("he", 1),
        ("in", 0),
        ("london", 3),
    ]


BYTES, SPACES = tokenizers.pre_tokenizers.ByteLevel, tokenizers.pre_tokenizers.Metaspace


def small_bpe(pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    """Of a few words."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=BYTES.alphabet())
    made.train_from_iterator(["a good film in London"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        BYTES(add_prefix_space=False),
        BYTES(add_prefix_space=True),
        SPACES(prepend_scheme="first"),
        SPACES(prepend_scheme="always"),
        SPACES(prepend_scheme="never"),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_length", [3, 32])
def test_every_word_is_read_as_in_a_text(pre_tokenizer: Any, max_length: int) -> None:
    tokenizer, words = small_bpe(pre_tokenizer), ("good", "film", "in", "London")
    sentence = Sentence(words, ("O", "B-X", "O", "B-Y"), 0)
    made = tokenize_tagged([sentence], ("O", "B-X", "I-X", "B-Y"), tokenizer, max_length)
    assert made.tokens.tolist() == tokenizer(f"a {' '.join(words)}")["input_ids"][-4:]
    assert made.labels.tolist() == [0, 1, 0, 3]


def test_a_tokenizer_in_python_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ByT5Tokenizer, has no fast form"):
        tokenize_tagged([Sentence(("a",), ("O",), 0)], ("O",), ByT5Tokenizer(), 16)


@pytest.mark.parametrize("max_length", [4, 7, 12, 64])
def test_long_sentences_are_cut_between_words_and_none_is_lost(max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset_path("minilm"))
    rng = np.random.default_rng(0)
    pool = ["a", "film", "unbelievably", "(", "self", ".", "thrombocytopenia", "cast"]
    sentences = [
        Sentence(tuple(rng.choice(pool, size)), tuple("B-X" if n % 3 else "O" for n in range(size)), 0)
        for size in rng.integers(1, 40, 50)
    ]
    made = tokenize_tagged(sentences, ("O", "B-X", "I-X"), tokenizer, max_length)
    assert made.lengths.max() <= max_length
    words = made.words[made.words >= 0]
    assert words.tolist() == list(range(len(made.word_labels)))
    assert (made.labels[made.words >= 0] == made.word_labels).all()
    assert made.sentence_ends.tolist() == np.cumsum([len(s.words) for s in sentences]).tolist()


def test_a_batch_without_samples_has_no_targets(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path / "bert"))
    made = tokenize_tagged([Sentence(("good", "film"), ("B-X", "O"), 0)], ("O", "B-X", "I-X"), tokenizer, 16)
    batch = made.batch(np.zeros(0, np.int64), 0)
    assert (batch["labels"] == IGNORED).all()
    assert batch["input_ids"].shape == (1, 4)


# The standard library


def test_names_of_a_file_are_those_it_defines_and_imports(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        "import os.path as p, sys\nfrom collections.abc import Mapping\nfrom . import near\n"
        "class Reader(Mapping):\n    def read(self, size=-1, *rest, key):  # text\n        return lambda found: found.x\n"
        "value = 'two words'\nasync def later(): pass\n"
    )
    found = [" ".join(f"{word}/{tag}" if tag != "O" else word for word, tag in line) for line in lines_of(file)]
    assert found == [
        "import os/B-MODULE ./I-MODULE path/I-MODULE as p , sys/B-MODULE",
        "from collections/B-MODULE ./I-MODULE abc/I-MODULE import Mapping",
        "from . import near",
        "class Reader/B-CLASS ( Mapping ) :",
        "def read/B-FUNCTION ( self/B-ARGUMENT , size/B-ARGUMENT = - 1 , * rest/B-ARGUMENT , key/B-ARGUMENT ) :",
        "return lambda found/B-ARGUMENT : found . x",
        "async def later/B-FUNCTION ( ) : pass",
    ]


@pytest.mark.slow
def test_the_standard_library_gives_thousands_of_checked_sentences() -> None:
    raw = read_tags(TagData())
    assert raw.tag_names[1::2] == ("B-ARGUMENT", "B-CLASS", "B-FUNCTION", "B-MODULE")
    assert len(raw.train) > 8000
    assert raw.test is not None
    counts = {name: sum(tag == name for s in raw.train for tag in s.tags) for name in raw.tag_names}
    assert min(counts[f"B-{kind}"] for kind in ("ARGUMENT", "CLASS", "FUNCTION", "MODULE")) > 500
    assert names_file().read_text().startswith(DOCUMENT)
