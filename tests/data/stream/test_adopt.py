"""Files written by other tools' published layouts are read in place: the same tokens, the same documents, no copy."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.data.stream.test_tokenize import documents_of
from tests.tiny import tiny_tokens
from trainer.data.stream.adopt import adopt
from trainer.data.stream.shards import Tokenizer, read_manifest
from trainer.errors import DataError

EOS = 99
TOKENIZER = Tokenizer(sha256="0" * 64, vocabulary=1000, eos=EOS)
DOCUMENTS = [[1, 2, 3, EOS], [4, EOS], [5, 6, 7, 8, 9, EOS]]
FLAT = [token for document in DOCUMENTS for token in document]


def write_datatrove(folder: Path) -> None:
    """datatrove's DocumentTokenizer: tokens, .index of cumulative ends, .metadata."""
    np.array(FLAT, "<u2").tofile(folder / "000_tok.ds")
    np.cumsum([len(document) for document in DOCUMENTS]).astype("<u8").tofile(folder / "000_tok.ds.index")
    (folder / "000_tok.ds.metadata").write_text(f"gpt2|2\n{len(FLAT)}\n0 T")


def write_megatron(folder: Path) -> None:
    """Megatron's IndexedDatasetBuilder, int32, the last document of two sequences."""
    np.array(FLAT, "<i4").tofile(folder / "a.bin")
    lengths, documents = [4, 2, 3, 3], [0, 1, 2, 4]
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 4
    with (folder / "a.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 4))
        file.write(struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(documents)))
        file.write(
            np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes() + np.array(documents, "<i8").tobytes()
        )


def write_llm_c(folder: Path) -> None:
    """llm.c's data_common.write_datafile: 256 int32 of header; each document begins with the end-of-text token."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(FLAT)
    first = [token for document in DOCUMENTS for token in [EOS, *document[:-1]]]
    (folder / "a.bin").write_bytes(header.tobytes() + np.array(first, "<u2").tobytes())


def write_llama_3(folder: Path) -> None:
    """The same of llm.c's for Llama 3: another magic and version, uint32, <|begin_of_text|> first."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, len(FLAT)
    first = [token for document in DOCUMENTS for token in [EOS, *document[:-1]]]
    (folder / "a.bin").write_bytes(header.tobytes() + np.array(first, "<u4").tobytes())


def write_nanogpt(folder: Path) -> None:
    """nanoGPT's prepare.py: uint16 and nothing else."""
    np.array(FLAT, "<u2").tofile(folder / "train.bin")


WRITERS = {
    "datatrove": write_datatrove,
    "megatron": write_megatron,
    "llm.c": write_llm_c,
    "llama 3": write_llama_3,
    "nanogpt": write_nanogpt,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_foreign_file_is_read_in_place(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.iterdir()}
    adopt(tmp_path, TOKENIZER)
    assert {n: (p.stat().st_ino, p.read_bytes()) for n in before for p in [tmp_path / n]} == before
    wanted = [[EOS, *document[:-1]] for document in DOCUMENTS] if name in ("llm.c", "llama 3") else DOCUMENTS
    assert documents_of(tmp_path) == wanted
    assert sum(path.stat().st_size for path in tmp_path.glob("*.ends")) == 8 * len(DOCUMENTS)
    assert read_manifest(tmp_path).num_tokens == len(FLAT)


@pytest.mark.parametrize("name", WRITERS)
def test_a_truncated_foreign_file_is_refused(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    (file,) = [*tmp_path.glob("*.bin"), *tmp_path.glob("*.ds")]
    file.write_bytes(file.read_bytes()[:-6])
    if name == "nanogpt":
        return  # nothing in the file says how long it should be
    with pytest.raises(DataError, match=file.name):
        adopt(tmp_path, TOKENIZER)
    assert not (tmp_path / "manifest.json").exists()


def test_tokens_outside_the_vocabulary_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.ds and no \.bin file"):
        adopt(tmp_path, TOKENIZER)
    write_nanogpt(tmp_path)
    with pytest.raises(DataError, match=r"train\.bin has token 99 at byte 6, outside the vocabulary of 50"):
        adopt(tmp_path, TOKENIZER.model_copy(update={"vocabulary": 50}))
    with pytest.raises(DataError, match=r"train\.bin has no header.* cannot hold a vocabulary of 128,256"):
        adopt(tmp_path, TOKENIZER.model_copy(update={"vocabulary": 128_256}))
    assert not (tmp_path / "manifest.json").exists()


def test_a_marker_that_no_llm_c_document_begins_with_is_refused(tmp_path: Path) -> None:
    write_llama_3(tmp_path)  # Llama 3's own end-of-text token is not in such files
    with pytest.raises(DataError, match=r"--eos \(id 98\) is nowhere in .*a\.bin; .*<\|begin_of_text\|>"):
        adopt(tmp_path, TOKENIZER.model_copy(update={"eos": 98}))


def test_a_document_of_2_to_the_31_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ds").touch()
    os.truncate(tmp_path / "a.ds", 2 * 2**31)  # sparse: no disk, and refused before it is read
    np.array([2**31], "<u8").tofile(tmp_path / "a.ds.index")
    with pytest.raises(DataError, match=r"a\.ds has a document of 2,147,483,648 tokens"):
        adopt(tmp_path, TOKENIZER)


def test_a_dataset_keeps_its_manifest(tmp_path: Path) -> None:
    folder = tiny_tokens(tmp_path / "tokens")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=r"tokens is a token dataset already"):
        adopt(folder, TOKENIZER)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_name_that_no_manifest_holds_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_nanogpt(tmp_path)
    (tmp_path / "train.bin").rename(tmp_path / "a+b.bin")
    with pytest.raises(DataError, match=r"a\+b\.bin: a token file's name is letters"):
        adopt(tmp_path, TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["a+b.bin"]
