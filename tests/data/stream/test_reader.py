"""Streams: rows, labels and positions; what is kept between starts. Which samples there are is compared in test_oracle.py."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from trainer.data.batches import IGNORED
from trainer.data.stream.mix import Stage
from trainer.data.stream.packing import Packing
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.data.stream.shards import DatasetWriter, Tokenizer
from trainer.errors import DataError

TOKENIZER = Tokenizer(sha256="0" * 64, vocabulary=60_000, eos=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets of several small shards; every token tells its source and document."""
    root = tmp_path_factory.mktemp("streams")
    for source, count in enumerate((120, 60, 30)):
        rng = np.random.default_rng(source)
        writer = DatasetWriter(root / str(source), TOKENIZER, shard_bytes=900)
        for document in range(count):
            writer.add(np.full(rng.integers(1, 60), source * 1000 + document + 1))
        writer.finish()
    return [root / str(source) for source in range(3)]


def stream(
    folders: list[Path], packing: Packing = "best_fit", *, weights: tuple[float, ...] = (5, 3, 2), **more: object
) -> Stream:
    chosen = StreamSettings(sequence_length=32, packing=packing, **({"seed": 3, "window": 2, "max_epochs": 50} | more))  # type: ignore[arg-type]
    return Stream(folders, chosen, stages=[Stage(0, weights)])


def digest(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))).hexdigest()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_one_pass_over_a_source_holds_every_token_of_its_rows_once(packing: Packing, folders: list[Path]) -> None:
    one = stream(folders[:1], packing, weights=(1,), max_epochs=1)
    rows = one.rows[0]
    batch = one.batch(range(rows), document_ids=True)
    held = batch["input_ids"][batch["document_ids"] >= 0]
    rng = np.random.default_rng(0)
    wanted = np.concatenate([np.full(rng.integers(1, 60), document + 1) for document in range(120)])
    if packing == "best_fit":
        assert np.array_equal(np.sort(held), np.sort(wanted))
    else:
        assert len(held) == rows * 32 > len(wanted) - 32 * len(one.sources[0].rows)
    with pytest.raises(DataError, match="would be pass 2 over it"):
        one.batch([rows])


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_labels_positions_and_documents_of_a_row(packing: Packing, folders: list[Path]) -> None:
    batch = stream(folders, packing).batch(range(200), document_ids=True)
    ids, labels, positions, documents = (
        batch[name] for name in ("input_ids", "labels", "position_ids", "document_ids")
    )
    for b in range(200):
        for t in range(32):
            follows = t + 1 < 32 and documents[b, t] >= 0 and documents[b, t + 1] == documents[b, t]
            assert labels[b, t] == (ids[b, t + 1] if follows else IGNORED)
            is_start = t == 0 or documents[b, t] != documents[b, t - 1]
            if documents[b, t] >= 0:
                assert positions[b, t] == (0 if is_start else positions[b, t - 1] + 1)
        for number in range(documents[b].max() + 1):
            assert len(set(ids[b][documents[b] == number])) == 1  # a document is one repeated token here


def test_plans_are_kept_and_made_again_when_damaged(folders: list[Path], tmp_path: Path) -> None:
    chosen = StreamSettings(sequence_length=32, packing="best_fit", max_epochs=9)
    expected = digest(Stream(folders, chosen).batch(range(50)))
    for _ in range(2):
        assert digest(Stream(folders, chosen, plan_folder=tmp_path).batch(range(50))) == expected
    plans = sorted(tmp_path.glob("*.plan"))
    assert len(plans) > 3
    content = bytearray(plans[0].read_bytes())
    content[40] ^= 1
    plans[0].write_bytes(content)
    plans[1].write_bytes(b"")
    assert digest(Stream(folders, chosen, plan_folder=tmp_path).batch(range(50))) == expected


@pytest.mark.parametrize("isolate", [True, False])
def test_scattered_samples_are_the_same_and_nothing_is_kept_of_them(isolate: bool, folders: list[Path]) -> None:
    one, two = stream(folders, isolate=isolate), stream(folders, isolate=isolate)
    samples = [70, 3, 3, 41, 12]
    alone = one.batch(samples, document_ids=True, scattered=True)
    assert digest(alone) == digest(two.batch(samples, document_ids=True))
    assert not one._segments
    assert one.batch([], scattered=True)["input_ids"].shape == (0, 32)
    with pytest.raises(DataError, match="would be pass"):
        one.batch([5, 10**6], scattered=True)


def test_behind_the_first_source_that_ran_out_nothing_is_read(folders: list[Path]) -> None:
    """Also where the sample's own source has more."""
    one = stream(folders[:2], weights=(9, 1), max_epochs=1)
    last = next(k for k in range(10**4) if one.mixture.at(k) == (0, one.rows[0]))
    behind = next(k for k in range(last, 10**4) if one.mixture.at(k)[0] == 1)
    for scattered in (False, True):
        with pytest.raises(DataError, match=r"/0 has .* would be pass 2 over it"):
            one.batch([last, behind], scattered=scattered)
    with pytest.raises(DataError, match=r"/0 has .* would be pass 2 over it"):
        one.place(behind)


def test_a_shard_is_open_until_its_last_row_and_again_when_asked_for(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many files as a process may open hold no more than that many shards; going back reads the same."""
    monkeypatch.setattr("trainer.data.stream.source.OPEN_SHARDS", 1)
    one = stream(folders[:1], weights=(1,), max_epochs=1)
    count, most = one.rows[0], 0
    seen = []
    for sample in range(count):
        seen.append(digest(one.batch([sample])))
        most = max(most, len(one._segment(0).readers), len(one.sources[0].readers))
    assert most <= 4 < len(one.sources[0].rows)  # two windows of 2
    assert [digest(one.batch([sample])) for sample in range(count)] == seen


def test_sources_of_different_tokenizers_are_refused(folders: list[Path], tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "other", TOKENIZER.model_copy(update={"sha256": "1" * 64}))
    writer.add(np.ones(100))
    writer.finish()
    with pytest.raises(DataError, match=r"other was tokenized with another tokenizer than .*; tokenize both"):
        stream([folders[0], tmp_path / "other"], weights=(1, 1))


def test_a_file_order_for_validation(folders: list[Path]) -> None:
    one = stream(folders[:1], "concat", weights=(1,), shuffle=False)
    places = [(one.place(k).shard, one.place(k).row) for k in range(20)]
    assert places == sorted(places)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_sources_of_16_and_32_bits_mix(packing: Packing, folders: list[Path], tmp_path: Path) -> None:
    wide = tmp_path / "wide"  # as folders[0], the tokens in 32 bits, as Megatron writes them
    writer = DatasetWriter(wide, TOKENIZER, shard_bytes=1800)
    writer.dtype = "uint32"
    rng = np.random.default_rng(0)
    for document in range(120):
        writer.add(np.full(rng.integers(1, 60), document + 1))
    writer.finish()
    for isolate in (True, False):
        mixed, narrow = (
            stream(some, packing, weights=(5, 3), isolate=isolate) for some in ([wide, folders[1]], folders[:2])
        )
        assert [source.catalog.dtype for source in mixed.sources] == ["uint32", "uint16"]
        found, wanted = (one.batch(range(7, 60), document_ids=True) for one in (mixed, narrow))
        assert {int(token) // 1000 for token in np.unique(wanted["input_ids"])} == {0, 1}
        assert digest(found) == digest(wanted)
