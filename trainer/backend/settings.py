"""What an accelerate configuration may set and samestep decides itself: accepted where it agrees, refused where it would be overridden.

Place in the flow: `build_accelerator` asks before a model loads. Pure: takes the environment that the launcher made, changes nothing.
Invariant: no setting that a user wrote is overridden in silence; what accelerate's own questionnaire writes unasked is no conflict.
"""

import math
from collections.abc import Mapping

from trainer.config import RunConfig


def setting_problems(environ: Mapping[str, str], config: RunConfig, world_size: int) -> list[str]:
    """Each setting in `environ` that would be overridden: field, value, rule, fix."""
    problems = [
        _clipping_problem(environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto"), config.optim.max_grad_norm),
        _accumulation_problem(environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), config, world_size),
        _parallelism_problem(environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false")),
        _dynamo_problem(environ.get("ACCELERATE_DYNAMO_BACKEND", "no")),
        *_fsdp_problems(environ),
    ]
    return [problem for problem in problems if problem]


def _clipping_problem(value: str, max_grad_norm: float | None) -> str | None:
    if value == "auto":
        return None
    try:
        asked = float(value)
    except ValueError:  # accelerate would end in a traceback
        return f"deepspeed_config.gradient_clipping ({value}) must be a number or auto; leave it out"
    if asked == (max_grad_norm or 0.0):
        return None
    return (
        f"deepspeed_config.gradient_clipping ({value}) must be optim.max_grad_norm ({max_grad_norm}), which clips on every backend; "
        f"leave it out, and set optim.max_grad_norm={value if asked else 'none'}"
    )


def _accumulation_problem(value: str, config: RunConfig, world_size: int) -> str | None:
    """1 is what the questionnaire writes."""
    largest_share = math.ceil(config.train.global_batch_size / world_size)
    ours = math.ceil(largest_share / (config.train.micro_batch_size or largest_share))
    if not value.isdecimal() or int(value) == 0:  # accelerate would end in a traceback
        return (
            f"deepspeed_config.gradient_accumulation_steps ({value}) must be a whole number, at least 1; leave it out"
        )
    if int(value) in (1, ours):
        return None
    train = config.train
    return (
        f"deepspeed_config.gradient_accumulation_steps ({value}) must be what follows from train.global_batch_size "
        f"({train.global_batch_size}), train.micro_batch_size ({train.micro_batch_size}) and {world_size} process(es), {ours}; "
        f"leave it out, and set train.micro_batch_size={math.ceil(largest_share / int(value))}"
    )


def _parallelism_problem(value: str) -> str | None:
    """accelerate reads the section on FSDP alone: its groups would not be used, and context parallelism drops attention masks."""
    if value.lower() != "true":
        return None
    return (
        "parallelism_config is not supported: samestep shards over all processes, and splits neither rows nor layers; leave it "
        "out"
    )


def _dynamo_problem(value: str) -> str | None:
    """accelerate would wrap the model once more; `accelerate launch` writes NO where nothing is set."""
    if value.lower() == "no":
        return None
    return f"dynamo_config.dynamo_backend ({value}) is not supported: no backend compiles the model; leave it out, or set it to no"


def _fsdp_problems(environ: Mapping[str, str]) -> list[str]:
    problems = []
    policy = environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    if policy.upper() == "SIZE_BASED_WRAP":
        problems.append(
            f"fsdp_config.fsdp_auto_wrap_policy ({policy}) is not supported: samestep wraps the model's repeated blocks; "
            "set it to TRANSFORMER_BASED_WRAP or NO_WRAP"
        )
    if environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
        problems.append(
            "fsdp_config.fsdp_activation_checkpointing (true) is not supported: recomputing belongs to the recipe, on every backend; "
            "set it to false, and model.gradient_checkpointing=true"
        )
    ignored = environ.get("FSDP_IGNORED_MODULES", "")
    if ignored:
        problems.append(
            f"fsdp_config.fsdp_ignored_modules ({ignored}) is not supported: every parameter is sharded; leave it out"
        )
    return problems
