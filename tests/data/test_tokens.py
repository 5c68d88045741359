"""Tokens in flat arrays are what the tokenizer says of each text alone, and lengths are counted before the cut."""

from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_bert
from trainer.data import tokens
from trainer.data.samples import Samples
from trainer.data.tokens import Split, check_max_length, tokenize
from trainer.errors import ConfigError, DataError

TEXTS = ["a good film", "the film is very good and the story is dull", "xyz!", "bad"]
PAIRS = ["very bad", "a story", "music and actors and the music", "dull"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert(tmp_path_factory.mktemp("tiny") / "model"))


def samples(texts: list[str], pairs: list[str] | None = None) -> Samples:
    return Samples(texts, pairs, np.arange(len(texts)))


def row(split: Split, number: int, flat: np.ndarray) -> list[int]:
    return flat[split.offsets[number] : split.offsets[number + 1]].tolist()


@pytest.mark.parametrize("pairs", [None, PAIRS])
@pytest.mark.parametrize("max_length", [5, 7, 128])
@pytest.mark.parametrize("chunk", [3, 10_000])
def test_each_sample_holds_the_tokens_of_its_text_alone(
    pairs: list[str] | None, max_length: int, chunk: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "CHUNK", chunk)
    done = tokenize(samples(TEXTS, pairs), tokenizer, max_length)
    split = done.split
    assert split.tokens.dtype == np.int32 and split.offsets.dtype == split.labels.dtype == np.int64
    for number, text in enumerate(TEXTS):
        second = None if pairs is None else pairs[number]
        alone = tokenizer(text, second, truncation=True, max_length=max_length)
        assert row(split, number, split.tokens) == alone["input_ids"]
        if split.token_types is not None:
            assert row(split, number, split.token_types) == alone["token_type_ids"]
        assert done.full_lengths[number] == len(tokenizer(text, second)["input_ids"])
    assert (split.token_types is not None) == (pairs is not None)
    assert split.lengths.tolist() == [min(length, max_length) for length in done.full_lengths]


def test_the_lengths_are_described_as_they_were_before_the_cut(tokenizer: Any) -> None:
    done = tokenize(samples(TEXTS), tokenizer, 8)
    assert done.full_lengths.tolist() == [5, 12, 4, 3]
    assert done.describe_lengths(8) == "mean 6.0, p95 11, max 12; 25.0% cut at 8"


def test_a_text_without_a_token_is_an_error(tokenizer: Any) -> None:
    class NoSpecialTokens:
        """A real tokenizer, called as those of Llama and GPT-2 are: without special tokens around the text."""

        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, add_special_tokens=False, **options)

    with pytest.raises(DataError, match=r"1 texts have no token in the model's vocabulary, such as '\\u200b'"):
        tokenize(samples(["good", "\u200b"]), NoSpecialTokens(), 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_length", "pair", "positions", "message"),
    [
        (
            129,
            False,
            None,
            r"data\.max_length \(129\) must be at most 128, .* of model\.source \(asset:x\); set data\.max_length=128",
        ),
        (100, False, 64, r"data\.max_length \(100\) must be at most 64"),
        (2, False, None, r"data\.max_length \(2\) must be at least 3"),
        (4, True, None, r"data\.max_length \(4\) must be at least 5: the special tokens and one of each text"),
    ],
)
def test_a_length_that_does_not_fit_the_model_is_an_error(
    max_length: int, pair: bool, positions: int | None, message: str, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_max_length(max_length, tokenizer, pair=pair, source="asset:x", positions=positions)


@pytest.mark.parametrize("positions", [None, -1, 128, 512])
def test_lengths_up_to_the_limit_are_fine(positions: int | None, tokenizer: Any) -> None:
    for length in (3, 128):
        check_max_length(length, tokenizer, pair=False, source="asset:x", positions=positions)


def test_virtual_tokens_take_positions_from_the_text(tokenizer: Any) -> None:
    check_max_length(108, tokenizer, pair=False, source="asset:x", positions=128, virtual_tokens=20)
    with pytest.raises(
        ConfigError, match=r"at most 108, .* behind method\.num_virtual_tokens \(20\); set data\.max_length=108"
    ):
        check_max_length(109, tokenizer, pair=False, source="asset:x", positions=128, virtual_tokens=20)
