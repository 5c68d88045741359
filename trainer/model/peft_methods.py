"""The methods that PEFT has: our settings as PEFT's, and the model wrapped. What PEFT gets are whole layer names.

Place in the flow: methods.py's table calls `add_peft`. A classification head is trained as a copy; the rest of the base is frozen.
PEFT is imported at need: with bitsandbytes it takes seconds, and says things that belong into the log.
"""

import warnings
from collections.abc import Sequence
from functools import singledispatch
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.config import (
    DoraConfig,
    Ia3Config,
    LowRank,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    RsloraConfig,
    Section,
    VeraConfig,
)
from trainer.errors import ConfigError
from trainer.model.heads import HEADED_TASKS, head_modules, without_adapter
from trainer.model.targets import encoder_linears, kind_of, resolve_targets
from trainer.run_folder import PEFT_TASKS


def add_peft(model: nn.Module, method: MethodConfig, new_modules: Sequence[str], task: str) -> nn.Module:
    """The PEFT model. new_modules: drawn ones outside the head, which are trained and stored too."""
    import peft

    settings = peft_settings(method, model)
    settings.task_type = PEFT_TASKS[task]
    heads = head_modules(model) if task in HEADED_TASKS else ()
    if heads or new_modules:
        cast(Any, settings).modules_to_save = [*heads, *new_modules]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT corrects it per layer where kinds are mixed
        adapted = peft.get_peft_model(cast(peft.PeftModel, model), settings)
    scale_the_small_side(adapted)
    return cast(nn.Module, adapted)


@singledispatch
def peft_settings(method: Section, model: nn.Module) -> Any:
    """PEFT's settings of a method for this model."""
    raise AssertionError(f"{method} is not one of PEFT's methods")


@peft_settings.register
def _(method: LowRank, model: nn.Module) -> Any:
    import peft

    targets = resolve_targets(model, method.targets)
    return peft.LoraConfig(
        r=method.rank,
        lora_alpha=cast(int, method.alpha),
        lora_dropout=method.dropout,
        target_modules=targets,
        use_dora=isinstance(method, DoraConfig),
        use_rslora=isinstance(method, RsloraConfig),
        fan_in_fan_out=all_conv1d(model, targets),
    )


@peft_settings.register
def _(method: VeraConfig, model: nn.Module) -> Any:
    import peft

    targets = resolve_targets(model, method.targets)
    return peft.VeraConfig(
        r=method.rank,
        vera_dropout=method.dropout,
        target_modules=targets,
        fan_in_fan_out=all_conv1d(model, targets),
    )


@peft_settings.register
def _(method: Ia3Config, model: nn.Module) -> Any:
    import peft

    targets, feedforward = ia3_targets(method, model)
    return peft.IA3Config(
        target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=all_conv1d(model, targets)
    )


@peft_settings.register
def _(method: PromptConfig, model: nn.Module) -> Any:
    import peft

    return peft.PromptTuningConfig(
        num_virtual_tokens=method.num_virtual_tokens, prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB
    )


@peft_settings.register
def _(method: PTuningConfig, model: nn.Module) -> Any:
    import peft

    return peft.PromptEncoderConfig(
        num_virtual_tokens=method.num_virtual_tokens, encoder_hidden_size=method.hidden_size
    )


@peft_settings.register
def _(method: PrefixConfig, model: nn.Module) -> Any:
    import peft

    return peft.PrefixTuningConfig(
        num_virtual_tokens=method.num_virtual_tokens,
        encoder_hidden_size=cast(int, method.projection_size),
        prefix_projection=method.projection_size is not None,
    )


def ia3_targets(method: Ia3Config, model: nn.Module) -> tuple[list[str], list[str]]:
    """Whole names of the layers that are scaled, and of those whose input is. ConfigError where PEFT does not know the architecture."""
    if method.targets is not None and method.feedforward is not None:
        scaled = resolve_targets(model, method.targets)
        return scaled, resolve_targets(model, method.feedforward, setting="method.feedforward")
    from peft.utils import constants

    kind = cast(Any, without_adapter(model)).config.model_type
    if kind not in constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        known = ", ".join(dict.fromkeys(map(kind_of, encoder_linears(model))))
        raise ConfigError(
            f"method.name (ia3): PEFT has no choice of layers for {kind}; set method.targets and method.feedforward. "
            f"It has: {known}"
        )
    scaled = resolve_targets(model, constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind])
    return scaled, resolve_targets(model, constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind])


def all_conv1d(model: nn.Module, targets: Sequence[str]) -> bool:
    """Whether all of these layers keep their weight as (in, out), as GPT-2's do."""
    return all(isinstance(model.get_submodule(name), Conv1D) for name in targets)


def is_prompt_learning(method: MethodConfig) -> bool:
    """Whether the method puts virtual tokens in front of the text."""
    return isinstance(method, PromptConfig | PTuningConfig | PrefixConfig)


def scale_the_small_side(adapted: nn.Module) -> None:
    """Multiply by alpha / rank after the first factor, which has `rank` columns, and not after the second, which has all of the layer's.

    The same product; it saves a pass over every layer's output, and one in the backward pass: 4 % of a step on a CPU.
    """
    from peft.tuners.lora.layer import Linear, LoraVariant

    class ScaledSmallSide(LoraVariant):
        """PEFT's own forward with the factors in another order."""

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
            first, second = module.lora_A[active_adapter], module.lora_B[active_adapter]
            return result + second(first(module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter])

    for layer in adapted.modules():
        if type(layer) is Linear and not layer.lora_variant:
            layer.lora_variant |= dict.fromkeys(layer.lora_A, ScaledSmallSide())
