"""What `encode` makes of conversations, tokens and targets, against golden text and a tokenizer written here, for every template."""

import re
from typing import Any

import pytest

from tests.data.test_templates import EOS, GOLDEN, LONG, SHORT, SPECIAL, tokenizer
from trainer.config import InstructData
from trainer.data.conversations import Conversation, Turn
from trainer.data.instruct import Sample, encode
from trainer.data.rendering import load_format
from trainer.data.templates import TEMPLATES


def tokens_by_hand(text: str) -> list[tuple[int, int, int]]:
    """(id, first character, last + 1): a special token is one, and of anything else every byte. Golden text is ASCII."""
    numbers, found, start = tokenizer().get_vocab(), [], 0
    for piece in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text):
        if piece in SPECIAL:
            found.append((numbers[piece], start, start + len(piece)))
        else:  # a byte-level vocabulary writes a space as Ġ and a line break as Ċ
            letters = piece.replace(" ", "Ġ").replace("\n", "Ċ")
            found += [(numbers[letter], start + at, start + at + 1) for at, letter in enumerate(letters)]
        start += len(piece)
    return found


def by_hand(text: str, answers: list[str], learn: str) -> tuple[list[int], list[bool]]:
    """Tokens up to the end of the last answer, and which of them are learned."""
    spans, place = [], 0
    for answer in answers:
        place = text.index(answer, place) + len(answer)
        spans.append((place - len(answer), place))
    learned = {"answers": spans, "last": spans[-1:], "everything": [(1, place)]}[learn]
    tokens = [token for token in tokens_by_hand(text) if token[1] < place]
    is_target = [any(first <= start and end <= last for first, last in learned) for _, start, end in tokens]
    if learn == "everything":
        is_target = [False] + [True] * (len(tokens) - 1)
    return [number for number, *_ in tokens], is_target


def encoded(name: str, turns: tuple[Turn, ...], *, num_examples: int = 0, **settings: Any) -> Sample:
    data = InstructData(max_length=2000, **settings)
    plain = tokenizer()
    (sample,) = encode([(Conversation(turns, "here"), num_examples)], load_format(name, plain), plain, data)
    assert sample is not None
    return sample


@pytest.mark.parametrize("learn", ["answers", "last", "everything"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_targets_are_those_of_the_golden_text(name: str, learn: str) -> None:
    short, short_answers, long, long_answers = GOLDEN[name]
    for turns, text, answers in ((SHORT, short, short_answers), (LONG, long, long_answers)):
        sample = encoded(name, turns, learn=learn)
        ids, is_target = by_hand(text, answers, learn)
        assert sample.ids.tolist() == ids
        assert sample.is_target.tolist() == is_target
        assert not sample.straddles
        assert not sample.begins_otherwise
        assert not sample.is_cut


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_example_is_not_learned_and_a_long_conversation_ends_behind_its_first_answer(name: str) -> None:
    _, _, text, answers = GOLDEN[name]
    sample = encoded(name, LONG, num_examples=3)
    assert (sample.ids.tolist(), sample.is_target.tolist()) == by_hand(text, answers, "last")
    ids, is_target = by_hand(text, answers[:1], "answers")
    plain = tokenizer()
    data = InstructData(max_length=max(len(ids), 8))
    (cut,) = encode([(Conversation(LONG, "here"), 0)], load_format(name, plain), plain, data)
    assert cut is not None
    assert (cut.ids.tolist(), cut.is_target.tolist(), cut.is_cut) == (ids, is_target, True)


def test_the_tokens_by_hand_know_special_ones() -> None:
    assert [end - start for _, start, end in tokens_by_hand(f"a b{EOS}")] == [1, 1, 1, len(EOS)]
