"""What is kept of a manifest and of row counts: the same as the manifest, found after a move, made again when damaged or outdated."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_tokens
from trainer.data.stream import source
from trainer.data.stream.catalog import Catalog, open_catalog
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.data.stream.shards import DatasetManifest, read_manifest
from trainer.errors import DataError

SETTINGS = StreamSettings(32, "best_fit", window=2, max_epochs=2)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tiny_tokens(tmp_path / "tokens", documents=60)


def same(catalog: Catalog, manifest: DatasetManifest) -> bool:
    facts = (catalog.dataset_id, catalog.dtype, catalog.tokenizer, catalog.num_tokens)
    assert facts == (manifest.dataset_id, manifest.dtype, manifest.tokenizer, manifest.num_tokens)
    return [catalog.shard(number) for number in range(len(catalog.tokens))] == manifest.shards


def test_a_kept_catalog_says_what_the_manifest_says_and_is_not_read_from_it(dataset: Path, tmp_path: Path) -> None:
    manifest = read_manifest(dataset)
    for kept in (None, tmp_path / "kept", tmp_path / "kept"):
        assert same(open_catalog(dataset, kept), manifest)
    (file,) = (tmp_path / "kept").iterdir()
    assert file.name == f"{manifest.dataset_id}.shards"
    written = file.stat().st_mtime_ns
    shutil.copytree(dataset, tmp_path / "moved")  # with the times of its files
    assert same(open_catalog(tmp_path / "moved", tmp_path / "kept"), manifest)
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("place", [0, 20, 40, -1])
def test_a_damaged_catalog_is_made_again_or_refused(place: int, dataset: Path, tmp_path: Path) -> None:
    manifest = read_manifest(dataset)
    open_catalog(dataset, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    found = open_catalog(dataset, tmp_path / "kept")
    if place >= 0:
        assert same(found, manifest)
    else:
        with pytest.raises(DataError, match="the hash of a description differs"):
            same(found, manifest)
    file.write_bytes(content[:30])
    assert same(open_catalog(dataset, tmp_path / "kept"), manifest)


def test_a_manifest_that_was_edited_is_found_although_it_was_read_before(dataset: Path, tmp_path: Path) -> None:
    Stream([dataset], SETTINGS, plan_folder=tmp_path / "kept").batch([0])
    path = dataset / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["tokens"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="was edited"):
        Stream([dataset], SETTINGS, plan_folder=tmp_path / "kept")


def test_later_starts_load_the_plans_of_the_shards_in_use_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Stream([dataset], SETTINGS, plan_folder=tmp_path / "kept")
    expected, rows = first.batch([3]), first.sources[0].rows
    plans = sorted((tmp_path / "kept").glob("*.plan"))
    assert len(plans) == len(rows) > 3
    later = Stream([dataset], SETTINGS, plan_folder=tmp_path / "kept")
    for path in plans:
        path.unlink()
    for path in dataset.glob("*.ends"):
        path.rename(path.with_suffix(".away"))
    assert np.array_equal(later.sources[0].rows, rows)  # with neither plans nor documents
    for path in dataset.glob("*.away"):
        path.rename(path.with_suffix(".ends"))
    monkeypatch.setattr(source, "KEPT_PLAN_BYTES", 0)
    assert np.array_equal(later.batch([3])["input_ids"], expected["input_ids"])
    assert len(later.sources[0].plans) == 1  # bounded by their bytes
