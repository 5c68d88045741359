"""From the configuration to a model ready for the backend: weights, dropout, method, checkpointing, summary.

Every rank builds the same model: new weights are drawn from `train.seed` on the CPU. Weights are fp32 whatever the precision.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.backend.request import read_request
from trainer.config import ClassificationData, MethodConfig, ModelConfig, QloraConfig, RunConfig
from trainer.data.added_tokens import read_tokens
from trainer.errors import ConfigError
from trainer.model.architecture import (
    LOADING_ERRORS,
    first_line,
    has_attention_dropout,
    load_architecture,
    load_tokenizer,
    meta_model,
    model_loader,
    model_location,
    source_error,
)
from trainer.model.dropout import FAST_ATTENTION, use_fast_dropout
from trainer.model.heads import HEADED_TASKS, encoder_prefix, head_modules
from trainer.model.identity import check_index, note_files
from trainer.model.isolation import check_isolation
from trainer.model.methods import apply_method, check_method
from trainer.model.mixup import blend_embeddings
from trainer.model.quantize import keep_layout, num_elements, quantization_config, stored_bytes
from trainer.model.targets import resolve_targets
from trainer.screen import announce

__all__ = ["build_model", "load_architecture", "load_tokenizer", "load_weights", "model_location", "quantization_of"]

MAX_NEW_FRACTION = 0.5  # of the encoder's parameters; more missing ones mean that the checkpoint is of another model


def build_model(
    config: RunConfig,
    label_names: Sequence[str],
    accelerator: Accelerator,
    *,
    vocab_size: int | None = None,
    special_ids: Mapping[str, int] | None = None,
) -> nn.Module:
    """The model of `config` on the CPU, its method applied; rank 0 prints a summary. Draws from torch's global generator.

    label_names: of the classes; empty for a language model. vocab_size, special_ids: of the data's
    tokenizer, where it decides (see Task).
    Every rank calls it; no collective. ConfigError for a source, a setting or a target that does not fit.
    """
    request = read_request(os.environ)
    check_method(config, request.backend)
    architecture = load_architecture(
        config.model, label_names, vocab_size=vocab_size, special_ids=special_ids or {}, target=config.target
    )
    torch.manual_seed(config.train.seed)
    quantization = quantization_of(config.model, config.method, architecture, precision=request.precision)
    plain, new_names = load_weights(config.model, architecture, quantization)
    check_no_batch_statistics(config.model.source, plain)
    check_head_is_read(config, plain, new_names)
    if config.model.added_tokens is not None:
        before = load_tokenizer(config.model.model_copy(update={"added_tokens": None}))
        grow_embeddings(plain, before, read_tokens(config.model.added_tokens))
    on_cpu = accelerator.device.type == "cpu"
    if config.model.attention == "auto" and on_cpu:
        use_fast_attention(plain)
    if config.model.gradient_checkpointing:
        enable_checkpointing(plain)
    if config.isolates_documents:
        check_isolation(plain, "data.packing=none" if config.data.kind == "instruct" else "data.isolate=false")
    model = apply_method(
        plain, config.method, new_modules=new_encoder_modules(plain, new_names), task=config.model.task
    )
    if on_cpu:
        use_fast_dropout(model)
    if isinstance(config.data, ClassificationData) and config.data.augment.mixes:
        blend_embeddings(model)
    announce(summary(config, plain, model, new_names), is_main=accelerator.is_main_process)
    return model


def quantization_of(
    model: ModelConfig, method: MethodConfig, architecture: PretrainedConfig, *, precision: str
) -> BitsAndBytesConfig | None:
    """How the base is quantized: for qlora every linear layer of the repeated blocks; for any other method not at all."""
    if not isinstance(method, QloraConfig):
        return None
    layers = meta_model(model, architecture)
    inside = set(resolve_targets(layers, "all-linear"))
    kept = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear) and name not in inside]
    return quantization_config(method, precision, kept)


def load_weights(
    model: ModelConfig, architecture: PretrainedConfig, quantization: BitsAndBytesConfig | None = None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the names of its tensors that were drawn instead of read (all of them where init=random: then empty)."""
    attention = None if model.attention == "auto" else model.attention
    options: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention,
        "dtype": torch.float32,
    }
    loader = model_loader(model, architecture)
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        if model.init == "random":
            return loader.from_config(architecture, **options), ()
        location = model_location(model.source)
        check_index(location)
        loaded, report = loader.from_pretrained(
            location,
            config=architecture,
            ignore_mismatched_sizes=True,  # a head of another label set is replaced; anything else is refused below
            output_loading_info=True,
            **options,
        )
    except LOADING_ERRORS as error:
        if attention is not None and any(word in str(error).lower() for word in ("attention", "attn")):
            raise ConfigError(
                f"model.attention ({attention}) cannot run here ({first_line(error)}); use model.attention=auto"
            ) from None
        raise source_error(model, "weights", error) from None
    mismatched = [str(entry[0]) for entry in report["mismatched_keys"]]
    new_names = tuple(sorted({*report["missing_keys"], *mismatched}))
    check_loaded(model, loaded, new_names, mismatched)
    keep_layout(loaded)
    if quantization is not None:
        note_files(loaded, location)
    return loaded, new_names


def check_loaded(
    model: ModelConfig, loaded: PreTrainedModel, new_names: Sequence[str], mismatched: Sequence[str]
) -> None:
    """ConfigError where the checkpoint is of another model than its configuration says."""
    prefix = encoder_prefix(loaded)
    wrong = [name for name in mismatched if name.startswith(prefix)]
    if wrong:
        raise ConfigError(
            f"model.source ({model.source}): {wrong[0]} has another shape in the weights than in config.json; "
            "restore the config.json that belongs to these weights"
        )
    sizes = {name: parameter.numel() for name, parameter in loaded.named_parameters() if name.startswith(prefix)}
    share = sum(sizes.get(name, 0) for name in new_names) / max(sum(sizes.values()), 1)
    if share > MAX_NEW_FRACTION:
        raise ConfigError(
            f"model.source ({model.source}): its weights lack {share:.0%} of {type(loaded).__name__}'s encoder; they belong "
            "to another architecture; give matching weights, or model.init=random to train from scratch"
        )


def check_head_is_read(config: RunConfig, model: PreTrainedModel, new_names: Sequence[str]) -> None:
    """ConfigError for a language model's head that was drawn and would stay frozen: no method but full trains it, or exports it."""
    if config.model.task in HEADED_TASKS or config.method.name == "full":
        return
    heads = head_modules(model)
    drawn = [name for name in new_names if name.split(".")[0] in heads]
    if drawn:
        raise ConfigError(
            f"model.source ({config.model.source}): its weights lack {listing(drawn)}, which method.name={config.method.name} would leave "
            f"as drawn; use method.name=full, or a source that was trained for model.task={config.model.task}"
        )


def check_no_batch_statistics(source: str, model: nn.Module) -> None:
    """ConfigError for a layer that normalizes over the micro-batch: its step would depend on how the global batch is shared out."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ConfigError(
                f"model.source ({source}): {name} ({type(module).__name__}) normalizes over the micro-batch, which differs with the number "
                "of processes; give a model that normalizes each sample, as with LayerNorm"
            )


def new_encoder_modules(model: PreTrainedModel, new_names: Sequence[str]) -> tuple[str, ...]:
    """Modules outside the head that own newly drawn tensors, such as `bert.pooler.dense`."""
    heads = head_modules(model)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in new_names)
    return tuple(owner for owner in owners if owner.split(".")[0] not in heads)


def grow_embeddings(model: PreTrainedModel, before: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Rows for new tokens in the embeddings, and in the output layer where there is one: means of their pieces' rows. In place.

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


def use_fast_attention(model: PreTrainedModel) -> None:
    """On a CPU, replace the sdpa kernel where it would drop attention probabilities; see trainer/model/dropout.py."""
    if (
        model.config._attn_implementation == "sdpa"
        and has_attention_dropout(model.config)
        and model._can_set_attn_implementation()
    ):
        model.set_attn_implementation(FAST_ATTENTION)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each block in the backward pass. Non-reentrant, which needs no input that requires a gradient."""
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise ConfigError(
            f"model.gradient_checkpointing (true) would have no effect: {type(model).__name__} does not support it; set it to false"
        ) from None


def summary(config: RunConfig, plain: PreTrainedModel, model: nn.Module, new_names: Sequence[str]) -> str:
    """What was loaded and what of it is trained, a few lines."""
    total = sum(num_elements(p) for name, p in model.named_parameters() if ".original_module." not in name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    source, location = config.model.source, model_location(config.model.source)
    lines = [
        f"model      {source}" + (f" ({location})" if location != source else ""),
        f"           {type(plain).__name__}, {total:,} parameters, vocabulary {plain.config.vocab_size:,}",
        f"method     {config.method.name}: {trainable:,} parameters trainable ({trainable / total:.3%})",
    ]
    if isinstance(config.method, QloraConfig):
        size = sum(stored_bytes(p) for p in model.parameters()) / 2**20
        lines.append(f"weights    linear layers in {config.method.quantize}; all weights take {size:,.0f} MiB")
    if config.model.init == "random":
        lines.append(f"weights    all drawn from train.seed ({config.train.seed})")
    elif new_names:
        lines.append(
            f"weights    not in the checkpoint, drawn from train.seed ({config.train.seed}): {listing(new_names)}"
        )
    return "\n".join(lines)


def listing(names: Sequence[str], limit: int = 6) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
