"""Words of a domain as tokens of their own, which a tokenizer would cut into pieces: the file that lists them. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokens(file: Path, setting: str = "model.added_tokens") -> list[str]:
    """One token a line. ConfigError for a file that cannot be read, is empty, or names a token twice or with a space in it."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{setting} ({file}): cannot be read ({error}); give a UTF-8 file with one token a line"
        ) from None
    tokens = [line for line in lines if line.strip()]
    if not tokens:
        raise ConfigError(f"{setting} ({file}): holds no token; write one a line, or leave the setting out")
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if line.strip() and (line != line.strip() or " " in line):
            raise ConfigError(f"{setting} ({file}:{number}): {line!r:.60} has a space in it; a token is a single word")
        if line.strip() and line in seen:
            raise ConfigError(f"{setting} ({file}:{number}): {line!r:.60} stands there twice; leave one out")
        seen.add(line)
    return tokens


def add_tokens(
    tokenizer: "PreTrainedTokenizerBase | Tokenizer", file: Path, setting: str = "model.added_tokens"
) -> None:
    """Give the tokenizer the file's tokens, which stand for whole words only. ConfigError for one that it has. Changes the tokenizer."""
    tokens = read_tokens(file, setting)
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        shown = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        raise ConfigError(f"{setting} ({file}): the tokenizer has {shown} already; leave {len(there):,} of them out")
    tokenizer.add_tokens(whole_words(tokens))


def whole_words(tokens: Sequence[str]) -> list[AddedToken]:
    """Tokens that stand for whole words only, as the tokenizer has them before it cuts."""
    return [AddedToken(token, single_word=True, normalized=True) for token in tokens]
