"""One table of methods: which weights each trains, and where it works. `apply_method` before anything wraps the model.

`check_method` refuses before anything loads, from the architecture alone. Adding a method is a section in trainer/config/method.py and a
row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig

from trainer.backend.request import REPLACES_PARAMETERS
from trainer.backend.wrap import repeated_blocks
from trainer.config import AdapterConfig, LowRank, MethodConfig, QloraConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.architecture import AUTO_MODELS, check_task, load_architecture, load_tokenizer, meta_model
from trainer.model.bottleneck import bottleneck_targets, insert_bottlenecks
from trainer.model.heads import HEADED_TASKS, encoder_of, head_modules
from trainer.model.peft_methods import add_peft, is_prompt_learning, peft_settings

Adapt = Callable[[nn.Module, Any, Sequence[str], str], nn.Module]
"""(model, method, new modules, model.task) -> the model whose `requires_grad` is set, wrapped by PEFT or as it was."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    words: str
    """What is trained."""
    adapt: Adapt
    peak_lr: float
    """Where optim.peak_lr is none."""
    tasks: tuple[str, ...] = ("classification", "clm")
    is_adapter: bool = True
    """What is exported are the trained tensors alone; the base stays where it is."""
    merges: bool = False
    """An adapter can be added to the base's weights."""
    mixes: bool = False
    """PEFT runs its layers with a different adapter for each row of a batch."""
    peft_kind: str | None = None
    """PEFT's kind, where several methods are one; a base holds adapters of one kind."""


def apply_method(
    model: nn.Module, method: MethodConfig, *, new_modules: Sequence[str] = (), task: str = "classification"
) -> nn.Module:
    """The model with `requires_grad` set as the method says; for most methods wrapped by PEFT.

    new_modules: modules outside the head whose weights were not in the checkpoint, such as a missing pooler. All methods train
    them: random and frozen they would be lost with the process. New weights come from torch's global generator.
    """
    return METHODS[method.name].adapt(model, method, new_modules, task)


def train_all(model: nn.Module, method: MethodConfig, new_modules: Sequence[str], task: str) -> nn.Module:
    """Leave every weight trainable."""
    return model


def train_head(model: nn.Module, method: MethodConfig, new_modules: Sequence[str], task: str) -> nn.Module:
    """Freeze all but head and new modules."""
    model.requires_grad_(False)
    for name in trained_modules(model, new_modules, task):
        model.get_submodule(name).requires_grad_(True)
    return model


def train_biases(model: nn.Module, method: MethodConfig, new_modules: Sequence[str], task: str) -> nn.Module:
    """Freeze all but biases, head and new modules."""
    train_head(model, method, new_modules, task)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return model


def add_bottlenecks(model: nn.Module, method: AdapterConfig, new_modules: Sequence[str], task: str) -> nn.Module:
    """Put bottleneck adapters into the frozen model; train head and new modules too."""
    targets = bottleneck_targets(model, method)
    inserted = [f"{name}.{part}" for name in targets for part in ("down", "up")]
    trained = [*inserted, *trained_modules(model, new_modules, task)]
    insert_bottlenecks(
        model, {"targets": targets, "size": method.size, "activation": method.activation, "trained": trained}
    )
    return model


def trained_modules(model: nn.Module, new_modules: Sequence[str], task: str) -> tuple[str, ...]:
    """Head and new modules: what every method trains beside its own weights."""
    return (*(head_modules(model) if task in HEADED_TASKS else ()), *new_modules)


LORA: Any = {"tasks": (*HEADED_TASKS, "clm", "seq2seq"), "merges": True, "peft_kind": "lora"}
METHODS: dict[str, Method] = {
    "full": Method("every weight", train_all, 2e-5, tasks=tuple(AUTO_MODELS), is_adapter=False),
    "head": Method("the classification head", train_head, 1e-3, tasks=HEADED_TASKS, is_adapter=False),
    "bitfit": Method("biases", train_biases, 1e-3, is_adapter=False),
    "lora": Method("two low-rank factors a layer", add_peft, 3e-4, mixes=True, **LORA),
    "dora": Method("low-rank factors and a magnitude a layer", add_peft, 3e-4, **LORA),
    "rslora": Method("low-rank factors, scaled for high ranks", add_peft, 3e-4, mixes=True, **LORA),
    "qlora": Method("low-rank factors on a 4-bit base", add_peft, 3e-4, mixes=True, **LORA),
    "vera": Method("scales of shared random factors", add_peft, 3e-3, merges=True),
    "ia3": Method("factors on keys, values and feed-forward layers", add_peft, 3e-3, merges=True),
    "prompt": Method("vectors before the embedded text", add_peft, 1e-2),
    "p_tuning": Method("a network that makes vectors before the text", add_peft, 1e-3),
    "prefix": Method("keys and values before those of every layer", add_peft, 1e-2),
    "adapter": Method("bottleneck networks after the sublayers", add_bottlenecks, 3e-4),
}
"""method.name -> what it does."""


def check_method(config: RunConfig, backend: str | None = None) -> None:
    """ConfigError where the method does not fit task, backend, data or architecture: no weights, no memory.

    backend: None leaves out what depends on it.
    """
    method, row = config.method, METHODS[config.method.name]
    if isinstance(method, QloraConfig) and method.quantize == "int8" and backend in REPLACES_PARAMETERS:
        raise ConfigError(
            f"method.quantize (int8) does not run on {backend}, which replaces parameters by shards: those of bitsandbytes 0.50's "
            "int8 layers lose their scales; use method.quantize=nf4, or another backend"
        )
    if config.model.task not in row.tasks:
        raise ConfigError(
            f"method.name ({method.name}) trains {row.words}, which does not work with model.task={config.model.task}; use "
            + " or ".join(
                name for name, other in METHODS.items() if config.model.task in other.tasks and name in ("full", "lora")
            )
        )
    if config.model.init == "random" and method.name not in ("full", "head"):
        raise ConfigError(
            f"method.name ({method.name}) needs pretrained weights: an adapter is stored without its base, and the random base of "
            "model.init=random would be lost; use method.name=full"
        )
    if config.model.added_tokens is not None:
        if method.name != "full":
            raise ConfigError(
                f"model.added_tokens ({config.model.added_tokens}) needs method.name=full, not {method.name}, which leaves new "
                "tokens' embeddings as they start"
            )
        load_tokenizer(config.model)  # which reads the file
    if is_prompt_learning(method):
        check_virtual_tokens(config)
    architecture = load_architecture(config.model, ("0", "1"))
    check_task(config.model, architecture)
    check_not_quantized(config.model.source, architecture)
    check_layers(meta_model(config.model, architecture), method)


def check_virtual_tokens(config: RunConfig) -> None:
    """Virtual tokens stand before a whole row, so documents that are packed into one row cannot have their own."""
    name = config.method.name
    if config.isolates_documents:
        fix = "data.packing=none" if config.data.kind == "instruct" else "data.isolate=false"
        raise ConfigError(
            f"method.name ({name}) puts virtual tokens before a row, which documents packed into it and isolated do not see, but for the "
            f"first; use method.name=lora, or set {fix}"
        )
    if name == "prefix" and config.model.gradient_checkpointing:
        raise ConfigError(
            "method.name (prefix) passes keys and values, which model.gradient_checkpointing recomputes away; set it to false"
        )


def check_not_quantized(source: str, architecture: PretrainedConfig) -> None:
    """ConfigError for weights that are stored quantized: they cannot be trained, nor sharded as they are."""
    stored = getattr(architecture, "quantization_config", None)
    if stored is not None:
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ConfigError(
            f"model.source ({source}) is stored quantized ({kind}); give the model it was made from, with method.name=qlora, "
            "which quantizes it while it loads"
        )


def check_layers(layers: nn.Module, method: MethodConfig) -> None:
    """ConfigError for a target that does not exist, a rank that is too high, or a model that has nothing to train."""
    if method.name in ("full", "head"):
        return
    if method.name == "bitfit":
        inside = [name for block in repeated_blocks(encoder_of(layers)) for name, _ in block.named_parameters()]
        if not any(name.endswith("bias") for name in inside):
            raise ConfigError(
                f"method.name (bitfit) trains biases, and the layers of {type(layers).__name__} have none; use method.name=lora"
            )
    elif isinstance(method, AdapterConfig):
        bottleneck_targets(layers, method)
    else:
        settings = peft_settings(method, layers)
        if isinstance(method, LowRank):
            check_rank(layers, cast(Any, settings).target_modules, method.rank)


def check_rank(layers: nn.Module, targets: Sequence[str], rank: int) -> None:
    """ConfigError for a rank above the smaller side of a layer."""
    in_order = [name for name, _ in layers.named_modules() if name in targets]
    smallest = min(in_order, key=lambda name: min(layers.get_parameter(f"{name}.weight").shape))
    shape = tuple(layers.get_parameter(f"{smallest}.weight").shape)
    if rank > min(shape):
        raise ConfigError(
            f"method.rank ({rank}) must be at most {min(shape)}, the smaller side of {smallest} {shape}; lower it"
        )
