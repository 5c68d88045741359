"""From a file to tokenized splits and batches, and what is printed of them."""

import contextlib
import csv
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import ClassificationData, ModelConfig, RunConfig, TrainConfig
from trainer.data.batches import epoch_batches, micro_batches
from trainer.data.classify import ClassificationSet, RawSplits, Split, build_data, padding_share, read_splits
from trainer.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "model")


def write(path: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ("text", "label")) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def rows_of(count: int, word: str = "sentence") -> list[tuple[str, str]]:
    return [(f"{word} {number}", "ab"[number % 2]) for number in range(count)]


def build(model_folder: Path, world_size: int = 1, **settings: Any) -> tuple[ClassificationSet, str]:
    """The data set, and what was printed."""
    train = TrainConfig(num_epochs=1, global_batch_size=settings.pop("global_batch_size", 32))
    config = RunConfig(
        name="t", model=ModelConfig(source=str(model_folder)), data=ClassificationData(**settings), train=train
    )
    accelerator: Any = SimpleNamespace(is_main_process=True, num_processes=world_size)
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        return build_data(config, accelerator), screen.getvalue().rstrip()


def sizes(splits: RawSplits) -> tuple[int, ...]:
    return tuple(len(split) for split in (splits.train, splits.validation, splits.test) if split is not None)


def test_sst_is_split_70_15_15() -> None:
    splits = read_splits(ClassificationData(source="asset:sst"))
    assert sizes(splits) == (7050, 1511, 1511)
    assert splits.label_names == ("negative", "positive") and not splits.dropped


def test_reading_needs_no_torch_and_no_tokenizer(tmp_path: Path) -> None:
    source = write(tmp_path / "x.csv", rows_of(20))
    code = (
        "import sys; from trainer.config import ClassificationData; from trainer.data.classify import read_splits; "
        f"read_splits(ClassificationData(source={source!r})); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("named", "fractions", "expected"),
    [
        ((), (0.2, 0.1), (70, 20, 10)),
        ((), (0.2, 0.0), (80, 20)),
        (("validation",), (0.9, 0.1), (90, 12, 10)),
        (("test",), (0.2, 0.9), (80, 20, 12)),
        (("validation", "test"), (0.5, 0.9), (100, 12, 12)),
    ],
)
def test_named_splits_are_used_whole_and_the_others_held_out(
    named: tuple[str, ...], fractions: tuple[float, float], expected: tuple[int, ...], tmp_path: Path
) -> None:
    source = write(tmp_path / "train.csv", rows_of(100))
    files = {name: write(tmp_path / f"{name}.csv", rows_of(12, name)) for name in named}
    data = ClassificationData(source=source, validation_fraction=fractions[0], test_fraction=fractions[1], **files)
    splits = read_splits(data)
    assert sizes(splits) == expected
    for name in named:
        assert getattr(splits, name).texts == [f"{name} {number}" for number in range(12)]
    held_out = [text for split in (splits.train, splits.validation, splits.test) if split for text in split.texts]
    assert len(set(held_out)) == sum(expected)


def test_labels_outside_the_training_set_are_bad_rows_of_a_named_split(tmp_path: Path) -> None:
    source = write(tmp_path / "train.csv", rows_of(10))
    validation = write(tmp_path / "dev.csv", [("fine", "a"), ("dull", "c")])
    with pytest.raises(
        DataError, match=r"(?s)dev\.csv: 1 of 2 rows cannot be used.*unknown label: 1\n.*dev\.csv:3: 'c'"
    ):
        read_splits(ClassificationData(source=source, validation=validation, test_fraction=0))


def test_problems_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "train.csv", [*rows_of(10), ("", "a")])
    validation = write(tmp_path / "dev.csv", [("fine", "a"), ("dull", "")])
    with pytest.raises(DataError) as error:
        read_splits(ClassificationData(source=source, validation=validation, test_fraction=0))
    assert "train.csv:12" in str(error.value) and "dev.csv:3" in str(error.value)
    with pytest.raises(DataError) as error:
        read_splits(ClassificationData(source="none.csv", validation="neither.csv", test_fraction=0))
    assert "data.source (none.csv)" in str(error.value) and "data.validation (neither.csv)" in str(error.value)


def test_few_bad_rows_are_left_out_with_a_report(tmp_path: Path) -> None:
    source = write(tmp_path / "x.csv", [*rows_of(30), ("", "a"), ("fine", "")])
    splits = read_splits(ClassificationData(source=source, max_bad_fraction=0.1))
    assert sum(sizes(splits)) == 30
    assert splits.dropped == (
        f"{source}: 2 of 32 rows left out\n  empty text: 1\n    {source}:32\n  missing label: 1\n    {source}:33",
    )


def test_a_test_split_without_labels_is_an_error(tmp_path: Path) -> None:
    source, test = write(tmp_path / "train.csv", rows_of(10)), write(tmp_path / "test.csv", [("x", "-1"), ("y", "-1")])
    with pytest.raises(DataError, match=r"data\.test \(.*test\.csv\): no row has a label.*set data\.test=none"):
        read_splits(ClassificationData(source=source, test=test))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([("x", "a")] * 9, {}, r"data\.label \(label\): the only label in .* is 'a', and two or more are needed"),
        ([*rows_of(10), ("x", "c")], {}, r"'c' \(1\) has fewer samples than the 3 splits"),
        (
            rows_of(6),
            {"validation_fraction": 0.05},
            r"data\.validation_fraction \(0\.05\) of 6 samples is none; raise it",
        ),
        ([("", ""), ("", "")], {}, "no row has a label"),
    ],
)
def test_too_little_to_learn_from_is_an_error(
    rows: list[tuple[str, str]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_splits(ClassificationData(source=write(tmp_path / "x.csv", rows), **settings))


def test_what_the_data_is_is_printed(model_folder: Path, tmp_path: Path) -> None:
    source = str(tiny_sentences(tmp_path / "x.csv", rows=100))
    data, printed = build(model_folder, source=source, max_length=8)
    lengths = np.array(
        [len(data.tokenizer(text)["input_ids"]) for text in read_splits(ClassificationData(source=source)).train.texts]
    )
    batches = epoch_batches(np.minimum(lengths, 8), 32, 0, 0, group_by_length=True)
    padding = 1 - np.minimum(lengths, 8).sum() / sum(len(ids) * min(lengths[ids].max(), 8) for ids in batches)
    assert printed.split("\n") == [
        f"data       {source} (file), 100 rows",
        "           held out of it, stratified by label, data.split_seed 0: validation 15%, test 15%",
        "                       samples    negative    positive",
        "           train            70  35 (50.0%)  35 (50.0%)",
        "           validation       15   7 (46.7%)   8 (53.3%)",
        "           test             15   8 (53.3%)   7 (46.7%)",
        f"batches    3 global batches of 32 per epoch, the last of 6; {padding:.1%} padding",
        f"tokens     mean {lengths.mean():.1f}, p95 {np.percentile(lengths, 95):.0f}, max {lengths.max()}; "
        f"{np.mean(lengths > 8):.1%} cut at 8 (data.max_length)",
    ]


def test_of_many_classes_the_rarest_and_the_commonest_are_printed(model_folder: Path, tmp_path: Path) -> None:
    rows = [(f"good {number}", str(number % 8)) for number in range(160)] + [("bad", "3")] * 40
    _, printed = build(model_folder, source=write(tmp_path / "x.csv", rows), test_fraction=0)
    assert "samples of 8 labels   rarest: 0  commonest: 3" in printed
    assert "train                       170  17 (10.0%)    51 (30.0%)" in printed


def test_padding_is_that_of_the_micro_batches_of_every_rank() -> None:
    lengths = np.array([1, 2, 3, 4, 10, 10, 10])
    batches = [np.array([0, 1, 2, 3]), np.array([4, 5, 6])]
    assert padding_share(lengths, batches, 1, None) == pytest.approx(1 - 40 / 46)
    assert padding_share(lengths, batches, 2, None) == pytest.approx(1 - 40 / 42)
    assert padding_share(lengths, batches, 1, 2) == pytest.approx(1 - 40 / 42)
    assert padding_share(lengths, batches, 4, 1) == 0


@pytest.mark.parametrize("text_pair", [None, "other"])
def test_collate_pads_on_the_right_like_the_library(text_pair: str | None, model_folder: Path, tmp_path: Path) -> None:
    source = tiny_sentences(tmp_path / "x.csv", rows=60)
    rows = [
        (text, label, "a dull story " * (number % 3 + 1))
        for number, (text, label) in enumerate(list(csv.reader(source.open()))[1:])
    ]
    write(source, rows, ("text", "label", "other"))  # type: ignore[arg-type]
    data, _ = build(model_folder, source=str(source), text_pair=text_pair)
    raw = read_splits(ClassificationData(source=str(source), text_pair=text_pair)).train
    ids = np.array([5, 0, 33, 5])
    part = raw.take(ids)
    expected = data.tokenizer(part.texts, part.pairs, padding=True, return_tensors="pt")
    batch = data.collate(data.train, ids)
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | ({"token_type_ids"} if text_pair else set())
    for name in set(batch) - {"labels"}:
        assert batch[name].tolist() == expected[name].tolist(), name
        assert str(batch[name].dtype) == "torch.int64"
    assert batch["labels"].tolist() == part.labels.tolist()


def test_no_ids_make_a_dummy_sample_that_is_no_target() -> None:
    split = Split(np.array([7, 8, 9], np.int32), np.array([0, 2, 3]), None, np.array([1, 0]))
    data = ClassificationSet(split, split, None, ("a", "b"), tokenizer=None, pad_token_id=5)  # type: ignore[arg-type]
    batch = data.collate(split, np.array([], np.int64))
    assert batch["input_ids"].tolist() == [[7, 8]] and batch["labels"].tolist() == [-100]
    assert data.collate(split, np.array([1, 0]))["input_ids"].tolist() == [[9, 5], [7, 8]]


def test_every_sample_reaches_a_batch_once_under_any_number_of_ranks(model_folder: Path, tmp_path: Path) -> None:
    data, _ = build(model_folder, source=str(tiny_sentences(tmp_path / "x.csv", rows=70)))
    for world_size in (1, 2, 3):
        seen = []
        for ids in epoch_batches(data.train.lengths, 8, 0, 0, group_by_length=True):
            for rank in range(world_size):
                for share in micro_batches(ids, rank, world_size, 2):
                    labels = data.collate(data.train, share)["labels"].tolist()
                    seen += [label for label in labels if label != -100]
        assert sorted(seen) == sorted(data.train.labels.tolist())


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path, model_folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<end>", "good", "bad", "film"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="film"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "gpt"
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="film").save_pretrained(folder)
    GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=32).save_pretrained(folder)
    rows = [("good film", "a"), ("bad", "b")] * 8
    source = write(tmp_path / "x.csv", rows)
    data, _ = build(folder, source=source, max_length=16)
    assert data.pad_token_id == 0
    short, long = np.flatnonzero(data.train.lengths == 1)[0], np.flatnonzero(data.train.lengths == 2)[0]
    assert data.collate(data.train, np.array([short, long]))["input_ids"].tolist() == [[2, 0], [1, 3]]
    with pytest.raises(ConfigError, match=r"data\.max_length \(64\) must be at most 32"):  # the model's limit
        build(folder, source=source, max_length=64)


def test_a_length_beyond_the_model_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length \(200\) must be at most 128.*set data\.max_length=128"):
        build(model_folder, source=str(tiny_sentences(tmp_path / "x.csv")), max_length=200)
