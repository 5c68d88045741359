"""Token datasets: read back exactly, known by content, and damage found at first use, naming file and byte."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.json_values import JSON
from trainer.data.stream.shards import (
    BLOCK,
    LARGEST_TOKENS,
    DatasetManifest,
    DatasetWriter,
    ShardReader,
    Tokenizer,
    parse_manifest,
    read_manifest,
    verify_dataset,
    write_file,
)
from trainer.errors import DataError

TOKENIZER = Tokenizer(sha256="0" * 64, vocabulary=50_000, eos=0)


def documents(count: int = 300, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50_000, rng.integers(1, 9000)) for _ in range(count)]


def write(folder: Path, made: list[np.ndarray], shard_bytes: int = 2_000_000) -> DatasetManifest:
    writer = DatasetWriter(folder, TOKENIZER, shard_bytes=shard_bytes)
    for document in made:
        writer.add(document)
    return writer.finish()


def readers(folder: Path) -> list[ShardReader]:
    manifest = read_manifest(folder)
    return [ShardReader(folder, shard, manifest.dtype) for shard in manifest.shards]


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    made = documents()
    manifest = write(tmp_path / "set", made)
    assert (len(manifest.shards), manifest.dtype) == (2, "uint16")
    found = []
    for reader in readers(tmp_path / "set"):
        starts = np.concatenate([[0], reader.ends[:-1]])
        found += [reader.tokens(int(s), int(e - s)) for s, e in zip(starts, reader.ends, strict=True)]
    assert len(found) == len(made)
    assert all(np.array_equal(one, two) for one, two in zip(found, made, strict=True))
    assert [damage for _, damage in verify_dataset(tmp_path / "set")] == [None, None]


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    made = documents(20)
    first = write(tmp_path / "a", made).dataset_id
    assert write(tmp_path / "b", made).dataset_id == first
    assert write(tmp_path / "c", documents(20, seed=1)).dataset_id != first
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert read_manifest(tmp_path / "moved").dataset_id == first


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", TOKENIZER.model_copy(update={"vocabulary": 100_000}))
    writer.add(np.array([99_999]))
    assert writer.finish().dtype == "uint32"
    assert readers(tmp_path / "set")[0].tokens(0, 1).tolist() == [99_999]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_at_first_use(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip") / "set"
    shutil.copytree(dataset(tmp_path_factory), folder)
    file = folder / "shard-00000.bin"
    content = bytearray(file.read_bytes())
    place = int(position * len(content))
    content[place] ^= 1 << bit
    file.write_bytes(content)
    reader = readers(folder)[0]
    other_block = (place // BLOCK + 1) % len(reader.shard.blocks) * BLOCK // 2
    reader.tokens(other_block, 1)  # what is whole may be read
    with pytest.raises(DataError, match=f"shard-00000.bin: bytes from {place // BLOCK * BLOCK:,} on were changed"):
        reader.tokens(place // 2, 1)
    shutil.rmtree(folder)


_dataset: list[Path] = []


def dataset(factory: pytest.TempPathFactory) -> Path:
    if not _dataset:
        _dataset.append(factory.mktemp("shared") / "set")
        write(_dataset[0], documents())
    return _dataset[0]


@pytest.mark.parametrize("ruin", ["truncate", "delete", "ends", "manifest", "json", "name"])
def test_damage_is_a_data_error_that_names_the_file(ruin: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder, documents(50))
    shard, manifest = folder / "shard-00000.bin", folder / "manifest.json"
    content = json.loads(manifest.read_text())
    if ruin == "truncate":
        os.truncate(shard, 1000)
    elif ruin == "delete":
        shard.unlink()
    elif ruin == "ends":
        (folder / "shard-00000.ends").write_bytes(b"\x01" * 400)
    elif ruin == "manifest":
        content["shards"][0]["tokens"] -= 1
        manifest.write_text(json.dumps(content))
    elif ruin == "json":
        manifest.write_text("[" * 100_000)
    else:
        content["shards"][0]["file"] = "../escape"
        manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shard-00000|manifest\.json"):
        read_one(folder)


def read_one(folder: Path) -> None:
    (reader,) = readers(folder)
    reader.tokens(0, len(reader.ends))


def test_tokens_and_documents_that_cannot_be_are_refused(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", TOKENIZER)
    with pytest.raises(
        DataError, match=r"byte 2 of .*shard-00000\.bin\) has token 50000, outside the vocabulary of 50000"
    ):
        writer.add(np.array([1, 50_000]))
    with pytest.raises(DataError, match=r"a\.txt \(byte 0 of .*\) has token -1, outside"):
        writer.add(np.array([-1, 1]), "a.txt")
    huge = np.broadcast_to(np.zeros(1, np.uint16), LARGEST_TOKENS + 1)  # takes two bytes
    with pytest.raises(DataError, match=r"document 0 \(byte 0 of .*shard-00000\.bin\) has 2,147,483,648 tokens, more"):
        writer.add(huge)
    writer.add(np.zeros(0, np.int64))  # an empty document is one
    assert writer.finish().shards[0].documents == 1
    with pytest.raises(DataError, match="holds a dataset already"):
        DatasetWriter(tmp_path / "set", TOKENIZER)


def test_a_killed_writer_leaves_no_readable_dataset(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from pathlib import Path; from tests.data.stream.test_shards import *\n"
        f"write(Path({str(tmp_path / 'set')!r}), documents(3000), shard_bytes=300_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while len(list((tmp_path / "set").glob("*.bin"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_manifest(tmp_path / "set")


def test_files_are_replaced_under_names_that_no_other_container_takes(tmp_path: Path) -> None:
    (tmp_path / f".a.{os.getpid()}").mkdir()  # another's, of the same process number
    write_file(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


FIELDS = DatasetManifest(format="samestep-tokens-1", dtype="uint16", tokenizer=TOKENIZER, shards=[])


@settings(max_examples=300, deadline=None)
@given(
    whole=JSON, name=st.sampled_from([*DatasetManifest.model_fields, "dataset_id"]), value=JSON, is_whole=st.booleans()
)
def test_any_json_is_a_manifest_or_a_data_error(whole: object, name: str, value: object, is_whole: bool) -> None:
    content = whole if is_whole else FIELDS.model_dump(mode="json") | {name: value}
    with suppress(DataError):
        assert isinstance(parse_manifest(json.dumps(content).encode(), "here"), DatasetManifest)
