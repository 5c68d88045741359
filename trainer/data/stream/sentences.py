"""`asset:sst-train` and `asset:sst-validation` as token datasets: the sentences of asset:sst, by MiniLM's tokenizer. Made once, then kept.

For masked language modelling before a classifier is trained: the splits are those that recipes/lora_sst2.py cuts with its default
settings, so the model never sees a sentence that the classifier is tested on, nor its label.
"""

import json
from pathlib import Path

from trainer.config import ClassificationData
from trainer.data.assets import asset_path
from trainer.data.made import made_once
from trainer.data.samples import label_set, read_samples
from trainer.data.sources import read_source
from trainer.data.split import stratified_split
from trainer.data.stream.shards import MANIFEST
from trainer.data.stream.tokenize import tokenize

SENTENCES = {"asset:sst-train": "train", "asset:sst-validation": "validation"}
END = "[SEP]"


def sentences_dataset(source: str) -> Path:
    """The folder of one of SENTENCES, made at first use: a few seconds. Any number of processes may call it. DataError for a full disk."""
    part = SENTENCES[source]
    return (
        made_once("sst-tokens-minilm", make_datasets, is_whole=lambda folder: (folder / part / MANIFEST).exists())
        / part
    )


def make_datasets(folder: Path) -> None:
    """Tokenize both splits, a sentence a document."""
    for part, texts in split_sentences().items():
        file = folder.with_name(f"{part}.jsonl")
        file.write_text("".join(json_line(text) for text in texts), encoding="utf-8")
        tokenize([str(file)], folder / part, asset_path("minilm") / "tokenizer.json", eos=END)


def split_sentences() -> dict[str, list[str]]:
    """The sentences of the training and the validation split."""
    data = ClassificationData(source="asset:sst", labels=("negative", "positive"))
    table = read_source(data, {"data.text": data.text, "data.label": data.label})
    samples, _, problem = read_samples(table, data, label_set(table, data), setting="data.source")
    assert problem is None, problem
    sizes = (round(len(samples) * data.validation_fraction), round(len(samples) * data.test_fraction))
    train, validation, _ = stratified_split(samples.labels, sizes, label_set(table, data), seed=data.split_seed)
    return {"train": samples.take(train).texts, "validation": samples.take(validation).texts}


def json_line(text: str) -> str:
    """A document of a JSONL file."""
    return json.dumps({"text": text}) + "\n"
