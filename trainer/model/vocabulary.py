"""The tokenizer of a run on token datasets, with the special tokens that its objective needs. Loads no weights."""

import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.config import ModelConfig, StreamData
from trainer.data.objectives import OBJECTIVES, Vocabulary
from trainer.data.objectives.vocabulary import complete, vocabulary_of
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
    else:
        own = load_tokenizer(model)
        if own.get_vocab() != tokenizer.get_vocab():
            words = "" if model.added_tokens is None else f" --added-tokens {model.added_tokens}"
            raise ConfigError(
                f"model.source ({model.source}) has another tokenizer than the one that made data.sources; make them with its own: "
                f"samestep data tokenize TEXT --tokenizer {model.source}{words}"
            )
        tokenizer = own
    vocabulary = vocabulary_of(tokenizer, roles, objective=data.objective, source=model.source, separator=eos)
    return tokenizer, added, vocabulary


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a tokenizer that no model source holds as it is, for a checkpoint."""
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
    roles = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.model_max_length, **roles}
    content = cast(Any, tokenizer).backend_tokenizer.to_str()
    return {"tokenizer.json": content.encode(), "tokenizer_config.json": json.dumps(settings).encode()}
