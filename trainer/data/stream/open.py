"""From the settings of section data to streams that can be read: folders found, weights parsed, enough rows for the run. No torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config import RunConfig, StreamData
from trainer.data.assets import cache_folder
from trainer.data.objectives import is_paired, row_length
from trainer.data.stream.mix import Stage
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.data.stream.remote import RemoteDataset, is_url
from trainer.data.stream.sentences import SENTENCES, sentences_dataset
from trainer.data.stream.stdlib import PARTS, stdlib_dataset
from trainer.errors import ConfigError, DataError

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Streams:
    """What a run reads."""

    train: Stream
    validation: Stream
    validation_rows: int
    steps_per_epoch: int
    tokenizer_file: Path

    def validation_samples(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples of the rows of an evaluation: spread evenly over all held-out rows, of which the first may be unlike the others."""
        return ids * sum(self.validation.rows) // self.validation_rows


def open_streams(config: RunConfig) -> Streams:
    """The streams of a run. ConfigError for settings that do not fit together, DataError for datasets that cannot be read."""
    data = config.data
    assert isinstance(data, StreamData), data.kind
    num_remote = sum(map(is_url, (*data.sources, data.validation)))
    datasets = [open_dataset(source, data, num_remote) for source in data.sources]
    length = row_length(data)
    train = Stream(
        datasets, settings_of(data, config.train.seed, length), stages=stages_of(data), plan_folder=plan_folder(data)
    )
    check_capacity(train, data, config)
    validation = open_validation(open_dataset(data.validation, data, num_remote), data, train, length)
    steps_per_epoch = max(sum(train.rows) // config.train.global_batch_size, 1)
    rows = min(sum(validation.rows), data.validation_rows or sum(validation.rows))
    return Streams(train, validation, rows, steps_per_epoch, tokenizer_file(train))


def open_dataset(source: str, data: StreamData, num_remote: int) -> Path | RemoteDataset:
    """The folder of a source, or the copy of one behind a URL; remote ones share `data.cache_gb` equally."""
    if is_url(source):
        remote = RemoteDataset(source, data.cache or cache_folder(), limit_bytes=data.cache_gb * 1e9 / num_remote)
        remote.require_room(data.shuffle_window)
        return remote
    if source in PARTS:
        return stdlib_dataset(source)
    if source in SENTENCES:
        return sentences_dataset(source)
    if source.startswith("asset:"):
        raise DataError(f"data.sources ({source}): no such token dataset; there are {', '.join([*PARTS, *SENTENCES])}")
    return Path(source).expanduser()


def settings_of(data: StreamData, seed: int, length: int) -> StreamSettings:
    """How training rows of so many tokens are made."""
    return StreamSettings(
        sequence_length=length,
        packing=data.packing,
        isolate=knows_documents(data),
        seed=seed,
        window=data.shuffle_window,
        max_epochs=data.max_epochs,
    )


def knows_documents(data: StreamData) -> bool:
    """Whether a row must be told apart by document: to isolate them, or to take pairs of texts from one."""
    return data.isolate or is_paired(data)


def open_validation(dataset: Path | RemoteDataset, data: StreamData, train: Stream, length: int) -> Stream:
    """The held-out rows, in the order of the files, the same whatever the seed."""
    settings = StreamSettings(length, data.packing, knows_documents(data), shuffle=False)
    opened = Stream([dataset], settings, plan_folder=plan_folder(data))
    if opened.tokenizer != train.tokenizer:
        raise DataError(f"data.validation ({data.validation}) was made with another tokenizer than data.sources")
    if not sum(opened.rows):
        raise DataError(f"data.validation ({data.validation}) has not one row; lower data.sequence_length")
    return opened


def plan_folder(data: StreamData) -> Path:
    """Where packing plans are kept."""
    return (data.cache or cache_folder()) / "plans"


def stages_of(data: StreamData) -> list[Stage] | None:
    """Weights by sample; None where sources count by their rows. ConfigError for what cannot be read."""
    if not data.later_weights:
        return None if data.weights is None else [Stage(0, data.weights)]
    if data.weights is None:
        raise ConfigError("data.later_weights changes data.weights, which is not set; set it")
    stages = [Stage(0, data.weights)]
    for text in data.later_weights:
        start, _, weights = text.partition(":")
        try:
            stages.append(Stage(int(start), tuple(float(weight) for weight in weights.split("/"))))
        except ValueError:
            raise ConfigError(
                f"data.later_weights ({text}) must be SAMPLE:WEIGHT/WEIGHT, such as 100000:1/3; write it so"
            ) from None
    return stages


def check_capacity(train: Stream, data: StreamData, config: RunConfig) -> None:
    """DataError where the run would read a source more often than `data.max_epochs`, before anything is trained; of the one read most."""
    steps = config.train.max_steps
    rows, size = train.rows, config.train.global_batch_size
    if not sum(rows):
        raise DataError(f"data.sources have not one row of {data.sequence_length} tokens; lower data.sequence_length")
    if steps is None:
        assert config.train.num_epochs is not None
        steps = -(-int(config.train.num_epochs * 10**6) * max(sum(rows) // size, 1) // 10**6)
    read = list(zip(train.mixture.counts(steps * size), rows, data.sources, strict=True))
    for taken, held, source in read:
        if taken and not held:
            raise DataError(
                f"{source} has not one row of {data.sequence_length} tokens; leave it out, or lower data.sequence_length"
            )
    taken, held, source = max(read, key=lambda one: one[0] / max(one[1], 1))
    if taken > data.max_epochs * held:
        raise DataError(
            f"{steps:,} steps of {size} rows would read {source} {taken / held:.2f} times, {taken:,} of its {held:,} rows; raise "
            f"data.max_epochs ({data.max_epochs:g}) to {-(-100 * taken // held) / 100:g}, lower its weight, or train fewer steps"
        )


def tokenizer_file(stream: Stream) -> Path:
    """tokenizer.json of any source, which all share; the one whose hash the manifests state."""
    wanted = stream.tokenizer.sha256
    for source in stream.sources:
        path = source.folder / TOKENIZER
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted:
            return path
    raise DataError(
        f"{stream.sources[0].folder} has no {TOKENIZER} of hash {wanted[:12]}...; put the one that made its tokens there"
    )
