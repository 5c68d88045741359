"""Windows over long contexts: every token somewhere, every answer where its characters are, the same windows as transformers makes."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny import BAD, FILLERS, GOOD, SPECIAL, tiny_bert
from trainer.data.batches import IGNORED
from trainer.data.questions import Question
from trainer.data.windows import Windows, make_windows
from trainer.errors import ConfigError

CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")


@cache
def wordpiece() -> PreTrainedTokenizerBase:
    """BERT's, of whole words and single letters."""
    letters = [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for mark in ("", "##")]
    words = [*SPECIAL, *GOOD, *BAD, *FILLERS, *letters, ".", ",", "(", ")", "="]
    return BertTokenizerFast(
        vocab={word: place for place, word in enumerate(dict.fromkeys(words))}, model_max_length=512
    )


@cache
def bytelevel() -> PreTrainedTokenizerBase:
    """RoBERTa's kind: bytes, pairs framed by <s> </s></s> </s>, no token types."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join([*FILLERS, *GOOD, *BAD])] * 3, trainer)
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], model_max_length=512, **names
    )


TOKENIZERS = {"wordpiece": wordpiece, "bytelevel": bytelevel}
WORDS = st.lists(
    st.sampled_from([*GOOD, *FILLERS, "zebra", "(x=1)", "naïve", "Ünïcode", "…", "a_b", "\n\n", " "]), min_size=1
)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    words=WORDS,
    asked=st.lists(st.sampled_from(FILLERS), min_size=1, max_size=12),
    edges=st.tuples(st.floats(0, 1), st.floats(0, 0.3)),
    max_length=st.integers(32, 80),
    stride=st.integers(0, 16),
)
def test_every_token_is_in_a_window_and_every_answer_where_its_characters_are(
    kind: str, words: list[str], asked: list[str], edges: tuple[float, float], max_length: int, stride: int
) -> None:
    context = " ".join(words)
    start = int(edges[0] * (len(context) - 1))
    text = context[start : start + 1 + int(edges[1] * len(context))]
    assume(text.strip())
    tokenizer = TOKENIZERS[kind]()
    made = make_windows(
        [Question(" ".join(asked), context, ((text, start),))], tokenizer, max_length=max_length, stride=stride
    )
    assert made.lengths.max() <= max_length
    covered = np.zeros(len(context), bool)
    for window in range(len(made)):
        places = places_of(made, window)
        for first, last in places:
            covered[first:last] = True
        first, last = made.labels[window]
        if first not in (made.cls[window], IGNORED):
            held = context[places[first][0] : places[last][1]]
            assert held.strip() == text.strip() or (text.strip() in held and is_across_tokens(places, start, len(text)))
    assert [
        character for character, is_there in zip(context, covered, strict=True) if not is_there and character.strip()
    ] == []


def places_of(made: Windows, window: int) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in made.places[made.offsets[window] : made.offsets[window + 1]].tolist()]  # type: ignore[misc]


def is_across_tokens(places: list[tuple[int, int]], start: int, length: int) -> bool:
    """Whether the answer begins or ends inside a token."""
    return any(first < edge < last for first, last in places for edge in (start, start + length))


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_windows_are_those_of_the_tokenizer_itself(kind: str) -> None:
    """Its truncation with return_overflowing_tokens is the oracle, for ids, types, offsets and the token of no answer."""
    tokenizer: Any = TOKENIZERS[kind]()
    rng = np.random.default_rng(0)
    for length in (0, 1, 20, 60, 200):
        context = " ".join(["good", *rng.choice([*FILLERS, "zebra"], length)])
        made = make_windows([Question(" is it ", context)], tokenizer, max_length=40, stride=9)
        expected = tokenizer(
            "is it", context, truncation="only_second", max_length=40, stride=9,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        assert len(made) == len(expected["input_ids"])
        for window, ids in enumerate(expected["input_ids"]):
            span = slice(made.offsets[window], made.offsets[window + 1])
            assert made.tokens[span].tolist() == ids
            sides = expected.sequence_ids(window)
            offsets = [
                place if side == 1 else (0, 0)
                for place, side in zip(expected["offset_mapping"][window], sides, strict=True)
            ]
            assert places_of(made, window) == offsets
            assert [place in range(*made.inside[window]) for place in range(len(ids))] == [side == 1 for side in sides]
            assert ids[made.cls[window]] == tokenizer.cls_token_id
            if "token_type_ids" in expected:
                assert made.token_types is not None
                assert made.token_types[span].tolist() == expected["token_type_ids"][window]
    assert (made.token_types is None) == (kind == "bytelevel")


def test_targets_worked_out_by_hand() -> None:
    """A window of 32 tokens holds [CLS], 3 tokens of the question, 2 [SEP] and 26 words; the next one begins 16 words later."""
    words = [FILLERS[number % len(FILLERS)] for number in range(60)]
    words[20] = "good"
    words[50] = "superb"
    context = " ".join(words)
    asked = [Question("is it", context, ((word, context.index(word)),)) for word in ("good", "superb")] + [
        Question("is it", context),
        Question("is it", context, ((" ".join(words[10:45]), context.index(words[10])),)),
    ]
    made = make_windows(asked, wordpiece(), max_length=32, stride=10)
    by_question = [made.labels[made.questions == number].tolist() for number in range(4)]
    before = 1 + 3 + 1  # [CLS] is i ##t [SEP]; the windows hold the words 0-25, 16-41, 32-57 and 48-59
    assert by_question[0] == [[before + 20] * 2, [before + 4] * 2, [0, 0], [0, 0]]
    assert by_question[1] == [[0, 0], [0, 0], [before + 18] * 2, [before + 2] * 2]
    assert by_question[2] == [[0, 0]] * 4  # without an answer: [CLS]
    assert by_question[3] == [[IGNORED, IGNORED]] * 4  # longer than any window: nothing is learned from it


def test_the_first_answer_is_learned_and_a_long_question_is_cut() -> None:
    context = "the film is good and the music is good"
    question = Question("a story " * 40, context, (("good", 34), ("good", 12)))
    made = make_windows([question], wordpiece(), max_length=40, stride=0)
    assert (made.inside[0, 0], len(made)) == (1 + 10 + 1, 1)  # a quarter of 40
    start, end = made.characters(np.array([0]), made.labels[:, 0], made.labels[:, 1])
    assert (start[0], end[0]) == (34, 38)


def test_batches_are_padded_and_a_dummy_has_no_target(tmp_path: Path) -> None:
    asked = [Question("is it", "good", (("good", 0),)), Question("is it", "a good film", (("film", 7),))]
    made = make_windows(asked, wordpiece(), max_length=32, stride=0)
    batch = made.batch(np.array([1, 0]), 0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 9), "attention_mask": (2, 9), "token_type_ids": (2, 9), "labels": (2, 2),
    }  # fmt: skip
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 7]
    assert batch["input_ids"][1, 7:].tolist() == [0, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert made.batch(np.array([], np.int64), 0)["labels"].tolist() == [[IGNORED, IGNORED]]


def test_a_tokenizer_without_places_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ByT5Tokenizer, has no fast form, and does not say where in a text its"):
        make_windows([], ByT5Tokenizer(), max_length=32, stride=0)


def test_the_tiny_model_reads_windows() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(Path(mkdtemp()) / "bert"))
    made = make_windows([Question("good", "bad film", (("film", 4),))], tokenizer, max_length=32, stride=0)
    assert made.tokens[[0, 2, 5]].tolist() == [CLS, SEP, SEP]
    assert made.labels.tolist() == [[4, 4]]
