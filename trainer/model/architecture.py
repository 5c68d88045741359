"""The model before its weights: where it lies, its tokenizer, its configuration, its layers on the meta device.

First stop of build_model, and all that checks before a launch need: nothing here loads a weight.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.config import ModelConfig, Target
from trainer.data.added_tokens import add_tokens
from trainer.errors import ConfigError
from trainer.model.pooled_head import check_pooling, pooled_class

AUTO_MODELS: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "clm": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "mlm_pairs": AutoModelForPreTraining,
    "plm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
"""model.task -> transformers' loader."""
TELLING_INPUTS = {"plm": ("perm_mask",), "mlm_pairs": ("next_sentence_label", "sentence_order_label")}
"""Tasks whose loader opens models that cannot do them -> an input that one which can takes."""

READ_LAST_POSITION = ("xlnet",)
"""Kinds whose head for classes reads what stands last, padded or not; texts here are padded on the right."""

PROBLEM_TYPES: dict[Target, str] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""data.target -> transformers' name of it, for whoever trains the exported model further."""

# What each of our three rates is called in the configurations of transformers' architectures.
DROPOUT_FIELDS = {
    "dropout": (
        "hidden_dropout_prob",  # BERT, RoBERTa, ALBERT, ELECTRA, MPNet, DeBERTa
        "hidden_dropout",  # GPT-NeoX, Falcon
        "dropout",  # DistilBERT, XLNet, OPT, BART
        "dropout_rate",  # T5
        "resid_pdrop",  # GPT-2
        "embd_pdrop",
        "mlp_dropout",  # ModernBERT
        "embedding_dropout",
    ),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
    "head_dropout": (
        "classifier_dropout",
        "classifier_dropout_prob",  # ALBERT
        "seq_classif_dropout",  # DistilBERT
        "cls_dropout",  # DeBERTa
        "summary_last_dropout",  # XLNet
    ),
}
# What transformers raises for a source that it cannot open.
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)


def model_location(source: str) -> str:
    """The folder of an asset, a local folder, or a hub id as transformers takes it. ConfigError for a folder that is missing."""
    if source.startswith("asset:"):
        from trainer.data.assets import asset_path

        return str(asset_path(source.removeprefix("asset:")))
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.source ({source}): the folder holds no config.json; give the folder of a saved model"
            )
        return str(folder)
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigError(
            f"model.source ({source}): there is no such folder; give asset:minilm, the folder of a saved model, or a hub id"
        )
    return source


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The source's tokenizer; one without a padding token (GPT-2, Llama) pads with its end-of-text token."""
    location = model_location(model.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=model.trust_remote_code)
    except LOADING_ERRORS as error:
        raise source_error(model, "tokenizer", error) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"model.source ({model.source}): its tokenizer has neither a padding nor an end-of-text token; add "
                "pad_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.added_tokens is not None:
        add_tokens(tokenizer, model.added_tokens)
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_architecture(
    model: ModelConfig,
    label_names: Sequence[str],
    *,
    vocab_size: int | None = None,
    special_ids: Mapping[str, int] = MappingProxyType({}),
    target: Target | None = None,
) -> PretrainedConfig:
    """The source's configuration with our labels, head, dropout rates and, where given, vocabulary and (for new weights) special tokens.

    target: of classification; None is one label. ConfigError where a rate would have no effect, the head does not fit the architecture,
    or the vocabulary of pretrained weights is too small.
    """
    names = [str(name) for name in label_names]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    try:
        architecture = AutoConfig.from_pretrained(
            model_location(model.source),
            trust_remote_code=model.trust_remote_code,
            **(labels if model.task in ("classification", "token_classification") else {}),
        )
    except LOADING_ERRORS as error:
        raise source_error(model, "configuration", error) from None
    architecture.use_cache = False  # of keys and values, for generation only
    set_dropout(architecture, model)
    set_head(architecture, model)
    if vocab_size is not None:
        set_vocabulary(architecture, model, vocab_size)
    if model.init == "random":
        for name, number in special_ids.items():
            if hasattr(architecture, name) or (name == "decoder_start_token_id" and architecture.is_encoder_decoder):
                setattr(architecture, name, number)
    if model.task == "question_answering":
        architecture.num_labels = 2  # a start and an end, whatever the source was trained for
    if model.task != "classification":
        return cast(PretrainedConfig, architecture)
    architecture.problem_type = PROBLEM_TYPES[target or "single"]  # a source may have been trained for something else
    if architecture.pad_token_id is None:
        architecture.pad_token_id = load_tokenizer(
            model
        ).pad_token_id  # decoders classify the last token before the padding
    return cast(PretrainedConfig, architecture)


def set_vocabulary(architecture: PretrainedConfig, model: ModelConfig, vocab_size: int) -> None:
    """That of the data's tokenizer, for new weights; pretrained ones must know every token."""
    if model.init == "random":
        architecture.vocab_size = vocab_size
        return
    known = architecture.vocab_size
    if model.added_tokens is not None:  # the embeddings will grow to these
        known = max(known, len(cast(Any, load_tokenizer(model))))
    if known < vocab_size:
        raise ConfigError(
            f"model.source ({model.source}) knows {known:,} tokens, but the data's tokenizer has {vocab_size:,}; "
            "tokenize with the model's own tokenizer, or set model.init=random"
        )


def set_dropout(architecture: PretrainedConfig, model: ModelConfig) -> None:
    """Write the rates that are not None into the architecture's own fields."""
    problems = []
    for setting, fields in DROPOUT_FIELDS.items():
        rate = getattr(model, setting)
        known = [field for field in fields if hasattr(architecture, field)]
        if setting == "head_dropout" and model.pooling != "model":
            continue  # of our own head
        if rate is not None and not known:
            problems.append(
                f"model.{setting} ({rate}) would have no effect: {architecture.model_type} has no such dropout; set it to none"
            )
        elif rate is not None:
            for field in known:
                setattr(architecture, field, rate)
    if problems:
        raise ConfigError(*problems)


def set_head(architecture: PretrainedConfig, model: ModelConfig) -> None:
    """Write down our own head, or take away that of a source which we trained. ConfigError where it does not fit the architecture."""
    settings: Any = architecture
    if model.pooling == "model":
        if hasattr(settings, "pooled_head"):
            del settings.pooled_head
        return
    check_pooling(model, architecture)
    rate = model.head_dropout if model.head_dropout is not None else usual_head_dropout(architecture)
    settings.pooled_head = {"pooling": model.pooling, "layers": model.head_layers or 1, "dropout": rate}


def usual_head_dropout(architecture: PretrainedConfig) -> float:
    """The architecture's rate before its own classifier, else that of its hidden states, else 0."""
    fields = (*DROPOUT_FIELDS["head_dropout"], *DROPOUT_FIELDS["dropout"])
    rates = [getattr(architecture, field, None) for field in fields]
    return float(next((rate for rate in rates if rate is not None), 0.0))


def model_loader(model: ModelConfig, architecture: PretrainedConfig) -> Any:
    """What has `from_pretrained` and `from_config`: transformers' Auto class of the task, or where the head is ours, our own class."""
    if model.pooling == "model":
        return AUTO_MODELS[model.task]
    return pooled_class(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(architecture)])


def has_attention_dropout(architecture: PretrainedConfig) -> bool:
    """Whether attention probabilities are dropped in training."""
    return any((getattr(architecture, field, None) or 0.0) > 0.0 for field in DROPOUT_FIELDS["attention_dropout"])


def check_task(model: ModelConfig, architecture: PretrainedConfig) -> None:
    """ConfigError for an architecture that cannot do model.task, with the tasks that it can, or whose own head reads padding."""
    if model.task == "classification" and model.pooling == "model" and architecture.model_type in READ_LAST_POSITION:
        raise ConfigError(
            f"model.pooling (model): the head of {architecture.model_type} reads a row's last position, where shorter texts of a batch are "
            "padded; use model.pooling=mean"
        )
    if model.trust_remote_code or can_do(model.task, architecture):
        return
    able = [task for task in AUTO_MODELS if can_do(task, architecture)]
    raise ConfigError(
        f"model.task ({model.task}): model.source ({model.source}) is of kind {architecture.model_type}, which cannot do it; take a model "
        f"that can, or one of {', '.join(able) or 'none of our tasks'}"
    )


def can_do(task: str, architecture: PretrainedConfig) -> bool:
    """Whether transformers has a model of this architecture for a task."""
    known = AUTO_MODELS[task]._model_mapping
    if type(architecture) not in known:
        return False
    kinds = known[type(architecture)]
    inputs = inspect.signature((kinds[0] if isinstance(kinds, tuple) else kinds).forward).parameters
    return task not in TELLING_INPUTS or any(name in inputs for name in TELLING_INPUTS[task])


def meta_model(model: ModelConfig, architecture: PretrainedConfig) -> PreTrainedModel:
    """The model's layers with shapes but no memory."""
    try:
        with torch.device("meta"):
            return cast(
                PreTrainedModel,
                model_loader(model, architecture).from_config(architecture, trust_remote_code=model.trust_remote_code),
            )
    except LOADING_ERRORS as error:
        raise source_error(model, "architecture", error) from None


def source_error(model: ModelConfig, part: str, error: Exception) -> ConfigError:
    """One sentence in place of transformers' own report."""
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        fix = (
            "its code would run on this machine; set model.trust_remote_code=true if you trust it, or use another model"
        )
    elif Path(model_location(model.source)).is_dir():
        fix = "give a folder written by save_pretrained of a model and its tokenizer"
    else:
        fix = "check the spelling, the network and HF_HUB_OFFLINE, or use asset:minilm or a local folder"
    return ConfigError(f"model.source ({model.source}): cannot load the {part} ({reason}); {fix}")


def first_line(error: Any) -> str:
    """The first line of an error's text, at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .:")
