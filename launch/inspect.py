"""`samestep inspect MODEL [TEXT]`: what a model is made of, and what its tokenizer makes of a text. Loads no weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trainer.errors import ConfigError
from trainer.quiet import quiet_libraries
from trainer.run_folder import INFO_FILE, MODEL_FOLDER, find_exported, read_info

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SIZES = {
    "hidden size": ("hidden_size", "d_model", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"),
    "decoder layers": ("num_decoder_layers", "decoder_layers"),
    "attention heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    "key/value heads": ("num_key_value_heads",),
    "feed-forward size": ("intermediate_size", "d_ff", "d_inner", "n_inner", "encoder_ffn_dim"),
    "positions": ("max_position_embeddings", "n_positions"),
}
"""What is shown -> what it is called in the configurations of transformers' architectures; the first that there is."""


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="asset:NAME, a folder, a hub id or a run directory.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to show the tokens of.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print a model's sizes and parameters, its tokenizer, and for each text its tokens, ids and mask. Loads no weights.

    Example: samestep inspect asset:minilm "a film of rare warmth"
    """
    quiet_libraries()
    from trainer.config import ModelConfig
    from trainer.data.tables import surrogate_problem
    from trainer.model.architecture import load_tokenizer

    for problem in filter(None, map(surrogate_problem, texts or ())):
        raise ConfigError(f"TEXT {problem}; write it in UTF-8")
    source = source_of(model)
    tokenizer = load_tokenizer(ModelConfig(source=source))
    facts = {**describe_model(source), **describe_tokenizer(tokenizer)}
    shown = [describe_text(tokenizer, text) for text in texts or ()]
    if as_json:
        print(json.dumps({"model": model, **facts, "texts": shown}, ensure_ascii=False))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")
    for text in shown:
        print_text(text)


def source_of(model: str) -> str:
    """What to open: of a run directory the exported model, or of an adapter its base. CheckpointError for a damaged samestep.json."""
    for folder in (Path(model) / MODEL_FOLDER, Path(model)):
        if (folder / INFO_FILE).is_file():
            is_whole = (folder / "config.json").is_file()
            return str(folder) if is_whole else str(read_info(find_exported(folder, None))["base"])
    return model


def describe_model(source: str) -> dict[str, Any]:
    """Architecture, sizes and parameters."""
    from transformers import AutoConfig

    from trainer.config import ModelConfig
    from trainer.model.architecture import LOADING_ERRORS, model_location, source_error

    model = ModelConfig(source=source)
    try:
        architecture = AutoConfig.from_pretrained(model_location(source))
    except LOADING_ERRORS as error:
        raise source_error(model, "configuration", error) from None
    names = getattr(architecture, "architectures", None) or [type(architecture).__name__]
    facts: dict[str, Any] = {"architecture": f"{names[0]} ({architecture.model_type})", "model": source}
    for title, fields in SIZES.items():
        values = [getattr(architecture, field) for field in fields if getattr(architecture, field, None) is not None]
        if values:
            facts[title] = int(values[0])
    return facts | parameters(model, architecture)


def parameters(model: Any, architecture: "PretrainedConfig") -> dict[str, int]:
    """How many in all, in embeddings, and in each layer; of the plain model without a head, whose layers are made without memory."""
    import torch
    from transformers import AutoModel

    from trainer.backend.wrap import repeated_blocks
    from trainer.model.architecture import LOADING_ERRORS, source_error

    try:
        with torch.device("meta"):
            layers = cast(Any, AutoModel).from_config(architecture)
    except LOADING_ERRORS as error:
        raise source_error(model, "architecture", error) from None
    blocks = repeated_blocks(layers)
    embeddings = layers.get_input_embeddings()
    return {
        "parameters without head": sum(parameter.numel() for parameter in layers.parameters()),
        "of token embeddings": sum(parameter.numel() for parameter in embeddings.parameters()),
        **({"of each layer": sum(parameter.numel() for parameter in blocks[0].parameters())} if blocks else {}),
    }


def describe_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Class, vocabulary, limit and special tokens."""
    known = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    longest = tokenizer.model_max_length
    return {
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": len(tokenizer.get_vocab()),
        "longest input": longest if longest < 10**9 else "not stated",
        "special tokens": ", ".join(f"{name.removesuffix('_token')} {token}" for name, token in known.items()),
        "chat template": "yes" if getattr(tokenizer, "chat_template", None) else "no",
    }


def describe_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> dict[str, Any]:
    """Tokens, ids, attention mask, and token types where the model takes them."""
    encoded = tokenizer(text, verbose=False)
    names = ("attention_mask", "token_type_ids")
    return {
        "text": text,
        "tokens": list(tokenizer.convert_ids_to_tokens(encoded["input_ids"])),
        "input_ids": list(encoded["input_ids"]),
        **{name: list(encoded[name]) for name in names if name in encoded},
    }


def print_text(shown: dict[str, Any]) -> None:
    """A row for each token."""
    from rich.console import Console
    from rich.table import Table

    words = len(shown["text"].split())
    print(f"\n{shown['text']}\n{words} words, {len(shown['tokens'])} tokens")
    table = Table(box=None, pad_edge=False)
    columns = [name for name in shown if name != "text"]
    for name in columns:
        table.add_column(name, justify="left" if name == "tokens" else "right")
    for row in zip(*(shown[name] for name in columns), strict=True):
        table.add_row(*map(str, row))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
