"""`samestep data tokenize | adopt | verify | stats`: token datasets, made and looked at without torch.

Exit codes: 0 fine, 2 a mistake in the command or input, 3 a damaged dataset.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from trainer.data.added_tokens import add_tokens
from trainer.data.assets import asset_path
from trainer.data.stream.adopt import adopt as adopt_folder
from trainer.data.stream.packing import make_plan, padding_of
from trainer.data.stream.shards import DatasetManifest, ShardReader, read_manifest, verify_dataset, write_file
from trainer.data.stream.tokenize import Tally, describe_tokenizer
from trainer.data.stream.tokenize import tokenize as tokenize_documents
from trainer.errors import DataError

DAMAGED = 3

data_app = typer.Typer(no_args_is_help=True, help="Make token datasets and look at them.", rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of a token dataset.")]
TokenizerOption = Annotated[str, typer.Option(help="tokenizer.json, a folder that holds it, or asset:NAME.")]
EosOption = Annotated[str | None, typer.Option(help="Token that ends every document, such as '<|endoftext|>'.")]


@data_app.command()
def tokenize(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files, folders, patterns, datasets, asset:stdlib.")
    ],
    *,
    output: Annotated[Path, typer.Option(help="Folder of the dataset; must not hold one.")],
    tokenizer: TokenizerOption,
    added_tokens: Annotated[
        Path | None, typer.Option(help="Words that are one token each, as `data vocabulary --output` writes them.")
    ] = None,
    eos: EosOption = None,
    column: Annotated[str, typer.Option(help="Column of JSON lines, Parquet and datasets.")] = "text",
    subset: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub dataset or one on disk.  [default: train]")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Tokenizing threads; the dataset is the same for any number.")
    ] = 1,
) -> None:
    """Tokenize text into shards; run again after a kill, it goes on.

    Example: samestep data tokenize asset:stdlib --output tokens --tokenizer asset:minilm --workers 2
    """
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    with extended_tokenizer(tokenizer_path(tokenizer), added_tokens) as file, bars as bar:
        task = bar.add_task("tokenizing", total=None)

        def watch(tally: Tally) -> None:
            speed = tally.tokens / max(time.monotonic() - began, 1e-9)
            words = (
                f"{tally.documents:,} documents ({tally.empty:,} empty), {tally.tokens:,} tokens, {speed:,.0f} tokens/s"
            )
            bar.update(task, description=words)

        manifest = tokenize_documents(
            inputs,
            output,
            file,
            eos=eos,
            column=column,
            subset=subset,
            split=split,
            workers=workers,
            watch=watch,
        )
    print(f"{output}: {summary(manifest)}")


@data_app.command()
def adopt(folder: Folder, *, tokenizer: TokenizerOption, eos: EosOption = None) -> None:
    """Describe token files of datatrove, Megatron, llm.c or nanoGPT where they lie; nothing is copied.

    Example: samestep data adopt /data/fineweb --tokenizer tokenizer.json --eos '<|endoftext|>'
    """
    file, beside = tokenizer_path(tokenizer), folder / "tokenizer.json"
    content = file.read_bytes()
    if beside.is_file() and beside.read_bytes() != content:
        raise DataError(
            f"{beside} is another tokenizer than --tokenizer ({tokenizer}), which would take its place; give that one, or move it away"
        )
    manifest = adopt_folder(folder, describe_tokenizer(file, eos), watch=print)
    write_file(beside, content)
    print(f"{folder}: {summary(manifest)}")


@data_app.command()
def verify(folder: Folder) -> None:
    """Hash every file of a dataset; exit code 3 where one is damaged.

    Example: samestep data verify tokens
    """
    num_damaged = 0
    for name, damage in verify_dataset(folder):
        print(f"{name}: {'whole' if damage is None else f'DAMAGED: {damage}'}", flush=True)
        num_damaged += damage is not None
    if num_damaged:
        raise typer.Exit(DAMAGED)


@data_app.command()
def stats(
    folder: Folder,
    sequence_length: Annotated[int, typer.Option(min=1, help="Row length for which packing is worked out.")] = 2048,
) -> None:
    """Print what a dataset holds, and what packing would make of it.

    Example: samestep data stats tokens --sequence-length 1024
    """
    manifest = read_manifest(folder)
    print(f"{folder}: {summary(manifest)}")
    ends = [ShardReader(folder, shard, manifest.dtype).ends for shard in manifest.shards]
    lengths = np.concatenate([np.diff(shard, prepend=0) for shard in ends])
    print(length_words(lengths))
    for packing in ("concat", "best_fit"):
        plans = [make_plan(shard, sequence_length, packing) for shard in ends]
        rows = sum(plan.num_rows for plan in plans)
        held = sum(int(plan.lengths.sum()) for plan in plans)
        left = manifest.num_tokens - held
        print(
            f"{packing}: {rows:,} rows of {sequence_length:,}, {padding_of(plans):.3%} padding, {left:,} tokens left over"
        )


def length_words(lengths: NDArray[np.int64]) -> str:
    """The documents' lengths in a line."""
    p50, p95 = np.percentile(lengths, [50, 95])
    return (
        f"documents: mean {lengths.mean():,.1f} tokens, median {p50:,.0f}, p95 {p95:,.0f}, longest {lengths.max():,}, "
        f"empty {(lengths == 0).sum():,}"
    )


def tokenizer_path(name: str) -> Path:
    """tokenizer.json of a file, a folder or an asset."""
    path = asset_path(name.removeprefix("asset:")) if name.startswith("asset:") else Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"--tokenizer ({name}): there is no {path}; give a tokenizer.json, a folder that holds one, or asset:NAME"
        )
    return path


@contextmanager
def extended_tokenizer(file: Path, added_tokens: Path | None) -> Iterator[Path]:
    """The tokenizer.json, or for as long as it is needed one with further tokens."""
    if added_tokens is None:
        yield file
        return
    describe_tokenizer(file, None)  # raises where it is none
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    add_tokens(tokenizer, added_tokens, "--added-tokens")
    with tempfile.TemporaryDirectory() as folder:
        extended = Path(folder) / "tokenizer.json"
        tokenizer.save(str(extended))
        yield extended


def summary(manifest: DatasetManifest) -> str:
    """Size and identity."""
    documents = sum(shard.documents for shard in manifest.shards)
    return (
        f"{manifest.num_tokens:,} tokens in {documents:,} documents, {len(manifest.shards)} shard(s) of {manifest.dtype}, "
        f"dataset id {manifest.dataset_id}"
    )
