"""From settings to streams: what does not fit is found before anything is trained, and says how it would."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_llama, tiny_tokens
from trainer.config import ModelConfig, RunConfig, StreamData, TrainConfig
from trainer.data.stream.mix import Stage
from trainer.data.stream.open import open_streams
from trainer.data.stream.shards import DatasetWriter, Tokenizer, read_manifest
from trainer.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    tiny_llama(folder / "model")
    for number, documents in enumerate((120, 60, 20)):
        tiny_tokens(folder / f"tokens-{number}", documents, seed=number)
    return folder


def config_of(root: Path, train: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    fixed = {
        "sources": (str(root / "tokens-0"), str(root / "tokens-1")),
        "validation": str(root / "tokens-2"),
        "sequence_length": 48,
        "cache": root / "cache",
    }
    return RunConfig(
        name="open",
        model=ModelConfig(source=str(root / "model"), task="clm", init="random"),
        data=StreamData(**(fixed | data)),
        train=TrainConfig(**({"max_steps": 3, "global_batch_size": 8, "metric": "loss"} | (train or {}))),
    )


def test_sources_count_by_their_rows_unless_weights_say_otherwise(root: Path) -> None:
    opened = open_streams(config_of(root))
    rows = opened.train.rows
    assert opened.train.mixture.counts(100 * sum(rows)) == tuple(100 * held for held in rows)
    weighted = open_streams(config_of(root, weights=(1, 3), later_weights=("5000:1/0",), max_epochs=9))
    assert weighted.train.stages == (Stage(0, (1.0, 3.0)), Stage(5000, (1.0, 0.0)))
    assert weighted.train.mixture.counts(10_000)[0] == pytest.approx(1250 + 5000, abs=20)  # 5,000 is inside a block


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_is_all_rows_of_all_sources(packing: str, root: Path) -> None:
    opened = open_streams(config_of(root, {"max_steps": None, "num_epochs": 1}, packing=packing))
    assert opened.steps_per_epoch == sum(opened.train.rows) // 8
    assert opened.validation_rows == sum(opened.validation.rows)
    places = {opened.train.place(sample) for sample in range(sum(opened.train.rows))}
    assert len(places) == sum(opened.train.rows)
    assert {place.epoch for place in places} == {0}


def test_the_message_says_how_often_a_source_would_be_read(root: Path) -> None:
    for weights in (None, (1, 1)):
        with pytest.raises(DataError, match=r"raise data\.max_epochs \(1\) to ") as refused:
            open_streams(config_of(root, {"max_steps": None, "num_epochs": 2}, weights=weights))
        most = float(str(refused.value).partition("(1) to ")[2].partition(",")[0])
        open_streams(config_of(root, {"max_steps": None, "num_epochs": 2}, weights=weights, max_epochs=most))
        with pytest.raises(DataError, match="would read"):
            open_streams(config_of(root, {"max_steps": None, "num_epochs": 2}, weights=weights, max_epochs=most - 0.01))


def test_a_source_too_small_to_be_mixed_by_its_rows_is_named(root: Path, tmp_path: Path) -> None:
    tokenizer = read_manifest(root / "tokens-0").tokenizer
    for name, tokens in (("large", 160_001), ("tiny", 17)):
        writer = DatasetWriter(tmp_path / name, tokenizer)
        writer.add(np.arange(tokens) % 60)
        writer.finish()
    sources = (str(root / "tokens-0"), str(tmp_path / "large"), str(tmp_path / "tiny"))
    (tmp_path / "large" / "tokenizer.json").write_bytes((root / "tokens-0" / "tokenizer.json").read_bytes())
    settings = {"sources": sources, "packing": "concat", "sequence_length": 16}
    with pytest.raises(DataError, match=r"tiny has 1 of the 10,\d+ rows .*; leave it out, or set data\.weights"):
        open_streams(config_of(root, **settings))
    open_streams(config_of(root, **(settings | {"sources": sources[:2]})))


@pytest.mark.parametrize(
    ("data", "train", "error", "words"),
    [
        ({"sources": ("nowhere",)}, {}, DataError, "nowhere is no token dataset"),
        ({"sources": ("asset:nothing",)}, {}, DataError, "there are asset:stdlib"),
        ({"later_weights": ("10:1/2",)}, {}, ConfigError, "data.weights, which is not set"),
        ({"weights": (1, 1), "later_weights": ("ten:1/2",)}, {}, ConfigError, "must be SAMPLE:WEIGHT/WEIGHT"),
        ({"weights": (1, 1), "later_weights": ("10:1",)}, {}, ConfigError, "one weight of 0 or more for each source"),
        ({"weights": (0, 0)}, {}, ConfigError, "not all 0"),
        ({}, {"max_steps": 10_000}, DataError, r"10,000 steps of 8 rows would read .* raise data.max_epochs \(1\)"),
        ({"weights": (1, 99)}, {"max_steps": 10}, DataError, "tokens-1 .* lower its weight"),
        ({"sequence_length": 100_000, "packing": "concat"}, {}, DataError, "not one row of 100000 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_errors(
    data: dict[str, Any], train: dict[str, Any], error: type[Exception], words: str, root: Path
) -> None:
    with pytest.raises(error, match=words):
        open_streams(config_of(root, train, **data))


def test_sources_and_validation_share_one_tokenizer(root: Path, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "other", Tokenizer(sha256="1" * 64, vocabulary=61, eos=60))
    for _ in range(30):
        writer.add(np.arange(60))
    writer.finish()
    with pytest.raises(DataError, match="another tokenizer"):
        open_streams(config_of(root, sources=(str(root / "tokens-0"), str(tmp_path / "other"))))
    with pytest.raises(DataError, match=r"another tokenizer than data\.sources"):
        open_streams(config_of(root, validation=str(tmp_path / "other")))
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        open_streams(config_of(root, sources=(str(tmp_path / "other"),), validation=str(tmp_path / "other")))
