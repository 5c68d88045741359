"""`samestep data show | bench`: one sample as a recipe would see it, and how fast its data can be read. No torch."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from launch.data import data_app
from launch.preflight import load_recipe
from trainer.config import RunConfig, StreamData
from trainer.data.stream.open import Streams, open_streams
from trainer.data.stream.reader import Source, Stream
from trainer.errors import ConfigError
from trainer.resolve import resolve

__all__ = ["data_app"]

FOUR = "four"
"""--objective: the figure that explains four of them."""

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Path of a recipe that reads token datasets.")]
ConfigOption = Annotated[list[Path] | None, typer.Option("--config", help="YAML file of settings; repeatable.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")]


@data_app.command()
def show(
    recipe: RecipeArgument,
    sample: Annotated[int, typer.Argument(metavar="K", min=0, help="Number of a sample, from 0.")],
    settings: Settings = None,
    config: ConfigOption = None,
    objective: Annotated[
        str | None,
        typer.Option(help="Show it as this objective would: mlm, span_corruption, plm, ...; four: explain four."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write it as a picture (.png).")] = None,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment", help="Of a recipe on labelled sentences: one before and after each kind of data.augment.kinds."
        ),
    ] = False,
) -> None:
    """Print sample K as the recipe would see it: its source, shard and row, each document's text, and what is to be found.

    Example: samestep data show recipes/pretrain_clm.py 4000 --objective mlm --plot sample.png
    """
    if augment:
        if objective is not None or plot is not None:
            raise ConfigError("--augment shows sentences, without --objective and --plot; leave them out")
        from launch.data_augment import show_augmented

        show_augmented(read_recipe(recipe, config, settings), sample)
        return
    found, streams = open_recipe(recipe, config, settings, objective)
    if objective == FOUR:
        from launch.data_objective import show_four

        show_four(found, streams, sample, plot or Path(f"{found.name}-objectives.png"))
        return
    size = found.train.global_batch_size
    print(f"sample {sample:,} of {found.name}: in step {sample // size + 1:,}, place {sample % size} of {size}")
    for line in describe_sample(streams, sample):
        print(line)
    if plot is not None or objective is not None or getattr(found.data, "objective", "clm") != "clm":
        from launch.data_objective import show_marked

        show_marked(found, streams, sample, plot)


@data_app.command()
def bench(
    recipe: RecipeArgument,
    settings: Settings = None,
    config: ConfigOption = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to read.")] = 5.0,
) -> None:
    """Read the recipe's global batches as fast as one process can, from the first sample on.

    Example: samestep data bench recipes/pretrain_clm.py data.sequence_length=1024
    """
    found, streams = open_recipe(recipe, config, settings)
    size, began, cpu_began = found.train.global_batch_size, time.perf_counter(), cpu_seconds()
    limit = int(sum(streams.train.rows) * streams.train.settings.max_epochs) // size * size
    first_s, samples, tokens = 0.0, 0, 0
    while time.perf_counter() - began < seconds and samples + size <= limit:
        batch = streams.train.batch(range(samples, samples + size))
        samples, tokens = samples + size, tokens + batch["input_ids"].size
        first_s = first_s or time.perf_counter() - began
    elapsed, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
    print(
        f"{samples:,} rows of {streams.train.settings.sequence_length} in {elapsed:.2f} s: {samples / elapsed:,.0f} rows/s, "
        f"{tokens / elapsed:,.0f} tokens/s, {cpu / tokens * 1e9:.1f} ns of CPU a token; the first batch after {first_s * 1e3:.1f} ms"
    )


def open_recipe(
    recipe: Path, config: list[Path] | None, settings: list[str] | None, objective: str | None = None
) -> tuple[RunConfig, Streams]:
    """A recipe's settings and streams, as they are or with another objective. ConfigError for one that reads no token datasets."""
    found = read_recipe(recipe, config, settings, None if objective == FOUR else objective)
    if not isinstance(found.data, StreamData):
        raise ConfigError(
            f"recipe ({recipe}) has data.kind={found.data.kind}, and no token datasets; give one of kind stream"
        )
    return found, open_streams(found)


def read_recipe(
    recipe: Path, config: list[Path] | None, settings: list[str] | None, objective: str | None = None
) -> RunConfig:
    """A recipe's settings with those of files and the command line, which may be those of another objective."""
    defaults: RunConfig = load_recipe(recipe).DEFAULTS
    if objective is not None and isinstance(defaults.data, StreamData):
        from launch.data_objective import with_objective

        defaults = with_objective(defaults, objective)
    arguments = [*(part for file in config or () for part in ("--config", str(file))), *(settings or ())]
    return resolve(type(defaults), defaults, arguments).config


def describe_sample(streams: Streams, sample: int) -> Iterator[str]:
    """Where a sample lies and what it says."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(streams.tokenizer_file))
    stream = streams.train
    place = stream.place(sample)
    source = stream.sources[place.source]
    shard = source.catalog.shard(place.shard)
    yield f"source {place.source} ({source.name}), pass {place.epoch + 1}, shard {shard.file}, row {place.row:,}"
    for start, length, ids in documents_of(stream, sample):
        document = document_number(source, place.shard, start)
        yield f"--- document {document:,} of the shard, tokens {start:,} to {start + length - 1:,}"
        yield tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def documents_of(stream: Stream, sample: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first token in the shard, tokens, ids) of each document in a row."""
    place = stream.place(sample)
    source = stream.sources[place.source]
    plan, reader = source.plan(place.shard), source.reader(place.shard)
    for piece in range(plan.row_starts[place.row], plan.row_starts[place.row + 1]):
        start, length = int(plan.starts[piece]), int(plan.lengths[piece])
        yield start, length, reader.tokens(start, length)


def document_number(source: Source, shard: int, token: int) -> int:
    """Which document of a shard a token belongs to, from 0."""
    if source.remote is not None:  # a plan that is kept from an earlier start needed no document ends
        source.remote.ends(source.catalog.shard(shard))
    return int(np.searchsorted(source.reader(shard).ends, token, side="right"))


def cpu_seconds() -> float:
    """Of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
