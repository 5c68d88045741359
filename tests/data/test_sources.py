"""What a source names is decided by one rule, and where nothing is found the message says what was tried."""

import os
from pathlib import Path

import pytest

from trainer.config import ClassificationData
from trainer.data.sources import is_hub_id, read_named_split, read_source
from trainer.errors import DataError

COLUMNS = {"data.text": "text", "data.label": "label"}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and the datasets library's own cache, in which owner/reviews lies as a download leaves it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    folder = tmp_path / "cache" / "owner___reviews" / "default" / "0.0.0" / "1234abcd"
    folder.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name="reviews")
    for split, labels in (("train", [0, 1, 0]), ("validation", [1, 0]), ("test", [-1, -1])):
        rows = {"text": [f"{split} {number}" for number in range(len(labels))], "label": labels}
        with datasets.arrow_writer.ArrowWriter(
            features=features, path=str(folder / f"reviews-{split}.arrow")
        ) as writer:
            writer.write_table(datasets.Dataset.from_dict(rows, features=features).data.table)
            writer.finalize()
        splits.add(datasets.SplitInfo(split, num_bytes=1, num_examples=len(labels), dataset_name="reviews"))
    info = datasets.DatasetInfo(
        features=features,
        splits=splits,
        builder_name="parquet",
        dataset_name="reviews",
        config_name="default",
        version="0.0.0",
    )
    info.write_to_directory(str(folder))
    return tmp_path / "cache"


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\nfine,a\ndull,b\n")
    return path


def test_paths_are_told_from_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb").mkdir()
    paths = [
        "missing/train.csv",
        "train.JSONL",
        "./x",
        "../x",
        "/x",
        "~/x",
        "a/b/c",
        "imdb",
        "a//b",
        "",
        "x" * 5000 + "/",
    ]
    assert [source for source in paths if is_hub_id(source)] == []
    assert all(map(is_hub_id, ["stanfordnlp/sst2", "sst2", "org/name.v2", "org/my-data_1"]))


def test_an_asset_is_read_and_called_one() -> None:
    table = read_source(ClassificationData(source="asset:sst"), COLUMNS)
    assert (table.kind, len(table), set(table.columns["label"])) == ("asset", 10_072, {"negative", "positive"})


def test_an_asset_without_sentences_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.source \(asset:minilm\) is an asset without sentences"):
        read_source(ClassificationData(source="asset:minilm"), COLUMNS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("review.csv", r"data\.source \(review\.csv\): there is no such file \(did you mean reviews\.csv\?\)"),
        ("data/revews.csv", r"there is no such file \(did you mean data/reviews\.csv\?\)"),
        ("data/zzz.csv", r"there is no such file in /.*data; give a file that exists"),
        ("dta/reviews.csv", r"there is no such file \(dta: No such file or directory\)"),
        ("data", r"data is a folder; give one file .*; in it are reviews\.csv"),
    ],
)
def test_a_missing_file_suggests_what_is_near(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "reviews.csv")
    write(tmp_path / "data" / "reviews.csv")
    with pytest.raises(DataError, match=message):
        read_source(ClassificationData(source=source), COLUMNS)


def test_a_hub_dataset_that_cannot_be_reached_says_what_was_tried_and_how_to_go_on(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub_cache.parent)
    write(hub_cache.parent / "data" / "reviews.csv")
    with pytest.raises(DataError) as error:
        read_source(ClassificationData(source="data/reviews"), COLUMNS)
    message = str(error.value)
    assert "data.source (data/reviews): there is no such file (did you mean data/reviews.csv?)" in message
    assert "split train of the hub dataset data/reviews cannot be loaded (" in message
    assert (
        "HF_HUB_OFFLINE" in message and "give a local .csv .tsv .jsonl or .parquet file as data.source=PATH" in message
    )


def test_a_hub_dataset_brings_its_splits_and_class_names(hub_cache: Path) -> None:
    data = ClassificationData(source="owner/reviews", validation="validation", test_fraction=0)
    train, validation = read_source(data, COLUMNS), read_named_split(data, "data.validation", "validation", COLUMNS)
    assert train.columns == {"text": ["train 0", "train 1", "train 2"], "label": [0, 1, 0]}
    assert train.class_names == {"label": ("pos", "neg")} and train.kind == "hub dataset"
    assert validation.columns["text"] == ["validation 0", "validation 1"]
    assert validation.place(2) == "owner/reviews[validation] row 2"


def test_a_split_that_a_hub_dataset_lacks_lists_those_it_has(hub_cache: Path) -> None:
    data = ClassificationData(source="owner/reviews", validation="dev", test_fraction=0)
    with pytest.raises(DataError, match=r'data\.validation \(dev\): .*Unknown split "dev".*train.*validation.*test'):
        read_named_split(data, "data.validation", "dev", COLUMNS)


def test_a_split_name_wins_over_a_folder_of_that_name(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub_cache / "validation").mkdir()
    monkeypatch.chdir(hub_cache)
    data = ClassificationData(source="owner/reviews", validation="validation")
    assert len(read_named_split(data, "data.validation", "validation", COLUMNS)) == 2


def test_a_split_of_the_hub_may_be_replaced_by_a_file(hub_cache: Path, tmp_path: Path) -> None:
    data = ClassificationData(source="owner/reviews")
    assert read_named_split(data, "data.test", str(write(tmp_path / "x.csv")), COLUMNS).kind == "file"


def test_a_split_name_beside_a_file_is_an_error(tmp_path: Path) -> None:
    data = ClassificationData(source=str(write(tmp_path / "x.csv")), validation="validation")
    with pytest.raises(DataError, match=r"data\.validation \(validation\): .*only where data\.source is a hub dataset"):
        read_named_split(data, "data.validation", "validation", COLUMNS)


def test_a_file_name_no_system_allows_is_a_missing_file() -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_source(ClassificationData(source=f"/{'x' * 5000}"), COLUMNS)
    assert os.sep == "/"
