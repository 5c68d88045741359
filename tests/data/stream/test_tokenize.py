"""`tokenize`: what comes out is what the tokenizer says, from every kind of file, by any number of workers, through any kill."""

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from trainer.data.assets import stdlib_files
from trainer.data.stream import tokenize as tokenize_module
from trainer.data.stream.documents import read_documents
from trainer.data.stream.shards import ShardReader, read_manifest
from trainer.data.stream.tokenize import PROGRESS, Tally, tokenize
from trainer.errors import DataError

END = "<end>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens, trained on a few files of the standard library."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(file) for file in stdlib_files()[:5]], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


TEXTS = ["def one():\n    return 1\n", "zwei = 'ünïcödé ✓'\n", "", "x" * 500, "three"]


def documents_of(folder: Path) -> list[list[int]]:
    manifest = read_manifest(folder)
    found = []
    for shard in manifest.shards:
        reader = ShardReader(folder, shard, manifest.dtype)
        starts = np.concatenate([[0], reader.ends[:-1]])
        found += [reader.tokens(int(s), int(e - s)).tolist() for s, e in zip(starts, reader.ends, strict=True)]
    return found


def inputs(kind: str, folder: Path) -> str:
    """The texts as this kind of file."""
    if kind == "folder":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        return str(folder)
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
        return str(folder / "a.parquet")
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in TEXTS).encode()
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as file:
            file.write(lines)
    else:
        (folder / "a.jsonl").write_bytes(lines)
    return str(folder / f"a.{kind}")


@pytest.mark.parametrize("kind", ["folder", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_gives_the_tokenizers_own_tokens(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tokenize([inputs(kind, tmp_path / "in")], tmp_path / "out", tokenizer, eos=END)
    plain = tokenizers.Tokenizer.from_file(str(tokenizer))
    assert documents_of(tmp_path / "out") == [[*plain.encode(text).ids, plain.token_to_id(END)] for text in TEXTS]


def test_one_and_two_workers_and_a_kill_give_the_same_dataset(tokenizer: Path, tmp_path: Path) -> None:
    root = stdlib_files()[0].parent
    names = [str(file) for file in stdlib_files() if file.parent == root][:120]
    (tmp_path / "names.json").write_text(json.dumps(names))
    whole = tokenize(names, tmp_path / "one", tokenizer, eos=END, shard_bytes=200_000)
    assert len(whole.shards) > 5
    two = tokenize(names, tmp_path / "two", tokenizer, eos=END, shard_bytes=200_000, workers=2)
    assert two.dataset_id == whole.dataset_id
    code = (
        "import json; from pathlib import Path; from trainer.data.stream.tokenize import tokenize\n"
        f"names = json.loads(Path({str(tmp_path / 'names.json')!r}).read_text())\n"
        f"tokenize(names, Path({str(tmp_path / 'killed')!r}), Path({str(tokenizer)!r}), eos={END!r}, shard_bytes=200_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    shards = random.randint(2, 4)  # the newest may be one that is not yet recorded
    while len(list((tmp_path / "killed").glob("*.bin"))) < shards and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.bin")}
    again = tokenize(names, tmp_path / "killed", tokenizer, eos=END, shard_bytes=200_000)
    assert again.dataset_id == whole.dataset_id
    assert any(path.stat().st_mtime_ns == written for path, written in kept.items())  # it went on


def interrupted(folder: Path, output: Path, tokenizer: Path) -> None:
    """A run over the texts of a folder that ends after its second unit, with some shards written."""
    seen: list[Tally] = []

    def watch(tally: Tally) -> None:
        seen.append(tally)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([str(folder)], output, tokenizer, eos=END, shard_bytes=3000, watch=watch)
    assert len(list(output.glob("*.bin"))) > 3


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts that are several units, which are small here."""
    monkeypatch.setattr(tokenize_module, "UNIT_CHARACTERS", 20_000)
    (tmp_path / "many").mkdir()
    for number in range(60):
        (tmp_path / "many" / f"{number:02d}.txt").write_text(f"number {number} " * 200)
    return tmp_path / "many"


@pytest.mark.parametrize("change", ["none", "other text", "one more", "one less"])
def test_a_run_goes_on_only_with_the_files_it_began_with(
    change: str, many: Path, tokenizer: Path, tmp_path: Path
) -> None:
    interrupted(many, tmp_path / "out", tokenizer)
    first = many / "00.txt"
    if change == "other text":
        first.write_text(first.read_text().replace("number", "NUMBER"))
    elif change == "one more":
        (many / "000.txt").write_text("more")
    elif change == "one less":
        first.unlink()
    kept = (tmp_path / "out" / "shard-00000.bin").stat().st_mtime_ns
    again = tokenize([str(many)], tmp_path / "out", tokenizer, eos=END, shard_bytes=3000)
    whole = tokenize([str(many)], tmp_path / "whole", tokenizer, eos=END, shard_bytes=3000)
    assert again.dataset_id == whole.dataset_id
    assert (kept == (tmp_path / "out" / "shard-00000.bin").stat().st_mtime_ns) == (change == "none")


@pytest.mark.parametrize("torn", [b'{"documents": 17, "sha', b"", None])
def test_progress_is_a_line_a_shard_and_the_last_may_be_torn(
    torn: bytes | None, many: Path, tokenizer: Path, tmp_path: Path
) -> None:
    interrupted(many, tmp_path / "out", tokenizer)
    progress = tmp_path / "out" / PROGRESS
    content = progress.read_bytes()
    assert content.count(b"\n") == 1 + len(list((tmp_path / "out").glob("*.bin")))
    progress.write_bytes(content[:-1] if torn is None else content + torn)
    again = tokenize([str(many)], tmp_path / "out", tokenizer, eos=END, shard_bytes=3000)
    assert again == tokenize([str(many)], tmp_path / "whole", tokenizer, eos=END, shard_bytes=3000)
    assert not progress.exists()


def test_a_token_outside_the_vocabulary_names_the_document_and_the_byte(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 5}, unk_token="a"))  # ids with a gap
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "a a"}\n{"text": "a b a"}\n')
    wanted = r"in\.jsonl, line 2 \(byte 6 of .*shard-00000\.bin\) has token 5, outside the vocabulary of 2"
    with pytest.raises(DataError, match=wanted):
        tokenize([str(tmp_path / "in.jsonl")], tmp_path / "out", tmp_path / "tokenizer.json", eos=None)


def test_truncation_and_padding_stored_in_the_tokenizer_are_not_used(tokenizer: Path, tmp_path: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(tokenizer))
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("def one(): return 1")
    tokenize([str(tmp_path / "a.txt")], tmp_path / "out", tmp_path / "tokenizer.json", eos=None)
    plain = tokenizers.Tokenizer.from_file(str(tokenizer))
    assert documents_of(tmp_path / "out") == [plain.encode("def one(): return 1").ids]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\xff", r"a\.txt: byte 4 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \xff}\n', r"a\.jsonl: byte 23 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b'{"body": "a"}\n', r"line 1: no column text; it has body: give --column"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: text is int, not text"),
        ("a.jsonl", b"", r"holds no document"),
        ("a.parquet", b"nothing", r"a\.parquet is no readable Parquet file"),
    ],
)
def test_bad_input_is_a_data_error_with_file_and_place(
    name: str, content: bytes, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokenize([str(tmp_path / name)], tmp_path / "out", tokenizer, eos=END)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_files_and_wrong_tokenizers_are_data_errors(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        tokenize([str(tmp_path / "none.jsonl")], tmp_path / "out", tokenizer, eos=END)
    with pytest.raises(DataError, match=r"--eos \(</s>\) is no token"):
        tokenize([str(tokenizer)], tmp_path / "out", tokenizer, eos="</s>")
    with pytest.raises(DataError, match=r"is no tokenizer\.json"):
        tokenize([str(tokenizer)], tmp_path / "out", Path(__file__), eos=None)


def test_the_standard_library_is_real_text() -> None:
    files = stdlib_files()
    assert len(files) > 500  # Debian packages it without its own tests
    first = next(read_documents(["asset:stdlib"], "text"))
    assert first.text == files[0].read_text(encoding="utf-8")
