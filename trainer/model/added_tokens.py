"""Tokens that a run adds to a model's vocabulary: words of a domain that its tokenizer would cut into pieces.

Place in the flow: `load_tokenizer` adds them, `build_model` grows the embeddings. Invariant: a new row starts as the mean of the rows of
the pieces that the word had before, so that the model begins with what it knew.
"""

from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import ConfigError


def read_tokens(file: Path) -> list[str]:
    """One token a line. ConfigError for a file that cannot be read, is empty, or names a token twice or with a space in it."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.added_tokens ({file}): cannot be read ({error}); give a UTF-8 file with one token a line"
        ) from None
    tokens = [line for line in lines if line.strip()]
    if not tokens:
        raise ConfigError(f"model.added_tokens ({file}): holds no token; write one a line, or leave the setting out")
    for number, line in enumerate(lines, start=1):
        if line.strip() and (line != line.strip() or " " in line):
            raise ConfigError(
                f"model.added_tokens ({file}:{number}): {line!r:.60} has a space in it; a token is a single word"
            )
        if line.strip() and lines.index(line) != number - 1:
            raise ConfigError(f"model.added_tokens ({file}:{number}): {line!r:.60} stands there twice; leave one out")
    return tokens


def add_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give the tokenizer the file's tokens, which stand for whole words only. ConfigError for one that it has. Changes the tokenizer."""
    tokens = read_tokens(file)
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        shown = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        raise ConfigError(
            f"model.added_tokens ({file}): the tokenizer has {shown} already; leave {len(there):,} of them out"
        )
    tokenizer.add_tokens([AddedToken(token, single_word=True, normalized=True) for token in tokens])


def grow_embeddings(model: PreTrainedModel, before: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Rows for new tokens in the embeddings, and in the output layer where there is one; means of their pieces' rows. In place.

    before: the tokenizer without them.
    """
    pieces = [before(f" {token}", add_special_tokens=False, verbose=False)["input_ids"] for token in tokens]
    first = len(cast(Any, before))
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    model.resize_token_embeddings(max(first + len(tokens), rows), mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for layer in cast(list[nn.Embedding], layers):
            for number, ids in enumerate(pieces):
                layer.weight[first + number] = layer.weight[ids].mean(dim=0)
