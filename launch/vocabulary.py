"""`samestep data vocabulary FILE...`: how a tokenizer cuts the words of a text, and which words would be worth tokens of their own."""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.data_look import data_app
from trainer.errors import ConfigError
from trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["data_app"]

WORD = re.compile(r"[^\W\d_]{2,}")
"""Two letters or more: what people call a word."""
SHOWN = 20


@dataclass(frozen=True)
class Word:
    """A word of the text."""

    text: str
    count: int
    pieces: tuple[str, ...]
    later: int
    """Its pieces where every word that is cut has a token: in byte-level vocabularies the space before it stays one."""

    @property
    def saved(self) -> int:
        """Tokens that the text would be shorter by."""
        return self.count * (len(self.pieces) - self.later)


@data_app.command()
def vocabulary(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Text, JSON lines, Parquet, a folder, a pattern.")
    ],
    tokenizer: Annotated[str, typer.Option(help="Whose: asset:NAME, a folder or a hub id.")] = "asset:minilm",
    column: Annotated[str, typer.Option(help="Text column of JSON lines, Parquet and datasets.")] = "text",
    add: Annotated[int, typer.Option(min=1, help="How many words to propose.")] = 100,
    output: Annotated[Path | None, typer.Option(help="Write them, one a line, for model.added_tokens.")] = None,
) -> None:
    """Print subwords per word of a text, and the words that cost most tokens; with --output write those.

    Example: samestep data vocabulary reviews.txt --tokenizer asset:minilm --add 200 --output words.txt
    """
    quiet_libraries()
    from trainer.config import ModelConfig
    from trainer.data.stream.documents import read_documents
    from trainer.model.architecture import load_tokenizer

    loaded = load_tokenizer(ModelConfig(source=tokenizer))
    is_lower = (
        loaded("Ab", add_special_tokens=False)["input_ids"] == loaded("ab", add_special_tokens=False)["input_ids"]
    )
    counts: Counter[str] = Counter()
    for document in read_documents(files, column):
        counts.update(WORD.findall(document.text.lower() if is_lower else document.text))
    if not counts:
        raise ConfigError(f"FILE ({', '.join(files)}): there is no word in it; give a text")
    words = cut_words(loaded, counts)
    proposed = sorted((word for word in words if word.saved > 0), key=lambda word: (-word.saved, word.text))[:add]
    print_words(words, proposed)
    if output is not None:
        write_words(output, [word.text for word in proposed])


def cut_words(tokenizer: "PreTrainedTokenizerBase", counts: Mapping[str, int]) -> list[Word]:
    """Every word as it is cut behind a space, now and with tokens for all that are cut and may have one."""
    from trainer.data.added_tokens import whole_words

    texts = [f" {name}" for name in counts]
    now = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    known, richer = tokenizer.get_vocab(), copy.deepcopy(tokenizer)
    cut = [name for name, ids in zip(counts, now, strict=True) if len(ids) > 1 and name not in known]
    richer.add_tokens(whole_words(cut))
    later = richer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [
        Word(name, count, tuple(tokenizer.convert_ids_to_tokens(ids)), min(len(ids), len(others)))
        for (name, count), ids, others in zip(counts.items(), now, later, strict=True)
    ]


def print_words(words: list[Word], proposed: list[Word]) -> None:
    """Figures of the text, and the first of the proposed words."""
    from rich.console import Console
    from rich.table import Table

    total = sum(word.count for word in words)
    pieces = sum(word.count * len(word.pieces) for word in words)
    whole = sum(word.count for word in words if len(word.pieces) == 1)
    saved = sum(word.saved for word in proposed)
    print(
        f"{total:,} words, {len(words):,} of them different: {pieces / total:.3f} subwords per word, {whole / total:.1%} kept whole"
    )
    if not proposed:
        print("no word would be cut less by a token of its own")
        return
    print(f"with {len(proposed):,} tokens more: {(pieces - saved) / total:.3f} subwords per word")
    table = Table(box=None, pad_edge=False)
    for title in ("word", "count", "now"):
        table.add_column(title, justify="right" if title == "count" else "left")
    for word in proposed[:SHOWN]:
        table.add_row(word.text, f"{word.count:,}", " ".join(word.pieces))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    if len(proposed) > SHOWN:
        print(f"and {len(proposed) - SHOWN:,} more")


def write_words(output: Path, words: list[str]) -> None:
    """The file for model.added_tokens."""
    if not words:
        raise ConfigError(
            f"--output ({output}): there is no word to write; none would be cut less by a token of its own"
        )
    try:
        output.write_text("\n".join(words) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output ({output}): cannot be written: {error.strerror}; give another path") from None
    print(f"wrote {output}; train with model.added_tokens={output}, tokenize with --added-tokens {output}")
