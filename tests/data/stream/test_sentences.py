"""asset:sst-train and asset:sst-validation: the sentences of the classifier's splits, and of no other."""

from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import ClassificationData
from trainer.data.assets import put_asset
from trainer.data.classify import read_splits
from trainer.data.stream.sentences import sentences_dataset, split_sentences
from trainer.data.stream.shards import ShardReader, read_ends, read_manifest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sst").mkdir()
    tiny_sentences(tmp_path / "sst" / "sst.tsv", rows=200)
    put_asset("sst", tmp_path / "sst")
    put_asset("minilm", tiny_bert(tmp_path / "bert"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_the_splits_are_those_of_the_classifier() -> None:
    raw = read_splits(ClassificationData(source="asset:sst", labels=("negative", "positive")))
    assert split_sentences() == {"train": raw.train.texts, "validation": raw.validation.texts}
    assert raw.test is not None


def test_each_sentence_is_a_document_that_ends_with_the_separator(cache: Path) -> None:
    folder = sentences_dataset("asset:sst-train")
    assert folder.parent.parent == cache
    manifest = read_manifest(folder)
    (shard,) = manifest.shards
    ends = read_ends(folder, shard)
    tokens = ShardReader(folder, shard, manifest.dtype).tokens(0, shard.tokens)
    assert len(ends) == len(split_sentences()["train"])
    assert (tokens[np.asarray(ends, np.int64) - 1] == manifest.tokenizer.eos).all()
    assert sentences_dataset("asset:sst-validation").parent == folder.parent
