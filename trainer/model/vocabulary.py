"""The tokenizer of a run on token datasets, with the special tokens that its objective needs. Loads no weights."""

import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.config import ModelConfig, StreamData
from trainer.data.objectives import OBJECTIVES, Vocabulary
from trainer.data.objectives.vocabulary import complete, frame, vocabulary_of
from trainer.errors import ConfigError
from trainer.model.architecture import load_tokenizer


def objective_vocabulary(
    model: ModelConfig, data: StreamData, tokenizer_file: Path, eos: int | None
) -> tuple[PreTrainedTokenizerBase, list[str], Vocabulary]:
    """The tokenizer, the special tokens that were added to it, and its vocabulary.

    tokenizer_file, eos: of the data, whose documents end with token `eos`; it is special, whatever it is called. A pretrained model brings
    its own tokenizer, a model from scratch takes the data's, completed. ConfigError where the two differ, or a special token that
    data.objective needs is missing.
    """
    roles = OBJECTIVES[data.objective].roles
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    added: list[str] = []
    if model.init == "random":
        added = complete(tokenizer, roles)
        frame(tokenizer, OBJECTIVES[data.objective].frame)
    else:
        own = load_tokenizer(model)
        if own.get_vocab() != tokenizer.get_vocab():
            raise other_tokenizer(model)
        tokenizer = own
    vocabulary = vocabulary_of(tokenizer, roles, objective=data.objective, source=model.source, separator=eos)
    return tokenizer, added, vocabulary


def check_next_tokens(model: ModelConfig, tokenizer_file: Path) -> None:
    """ConfigError where a token of the data would be another word, or none, to a pretrained causal model.

    Its tokenizer may have more tokens, but no added ones that the data cannot have.
    """
    if model.init == "random":
        return
    data = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file)).get_vocab()
    try:
        own = load_tokenizer(model).get_vocab()
    except ConfigError:
        if model.added_tokens is not None:
            raise
        return  # weights without a tokenizer: their number of tokens is all that can be compared (architecture.py)
    if not data.items() <= own.items() or (model.added_tokens is not None and len(data) < len(own)):
        raise other_tokenizer(model)


def other_tokenizer(model: ModelConfig) -> ConfigError:
    """What is wrong, and the command that mends it."""
    words = "" if model.added_tokens is None else f" --added-tokens {model.added_tokens}"
    return ConfigError(
        f"model.source ({model.source}) has another tokenizer than the one that made data.sources; make them with its own: "
        f"samestep data tokenize TEXT --tokenizer {model.source}{words}"
    )


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a tokenizer that no model source holds as it is, for a checkpoint."""
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
    roles = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.model_max_length, **roles}
    content = cast(Any, tokenizer).backend_tokenizer.to_str()
    return {"tokenizer.json": content.encode(), "tokenizer_config.json": json.dumps(settings).encode()}
