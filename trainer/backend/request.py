"""What the launcher asked for, read from the environment it set. Pure: takes a mapping, changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import PRECISIONS
from trainer.errors import BackendError

REPLACES_PARAMETERS = ("fsdp",)
"""Backends that put shards in place of parameters: what a parameter's class keeps beside its numbers is lost."""

OFFLOADS = {"optimizer": ("zero2", "zero3"), "param": ("zero3",)}
"""What DeepSpeed can keep in host memory, and under which stages accelerate offers it; under another it may do nothing."""


@dataclass(frozen=True)
class Request:
    """The backend, precision and number of processes a run was started with."""

    backend: str
    """single, ddp, fsdp, zero1, zero2 or zero3."""
    precision: str
    """no (fp32), bf16 or fp16."""
    world_size: int
    on_cpu: bool
    """The accelerate configuration asked for the CPU (`use_cpu: true`) even where there is a GPU."""
    offload: bool = False
    """Parameters or optimizer state live in host memory."""


def read_request(environ: Mapping[str, str]) -> Request:
    """The request that `accelerate launch`, torchrun or srun left in `environ`. Raises BackendError where it cannot be met."""
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS:
        raise BackendError(
            f"mixed precision ({precision}) must be one of {', '.join(PRECISIONS)}; start with --mixed_precision bf16"
        )
    backend, world_size = _backend_name(environ), int(environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" not in environ and (backend != "single" or world_size > 1):
        raise BackendError(
            f"asked for {backend} with {world_size} process(es), but this process has no rank (LOCAL_RANK is not set), so it would "
            "train alone; start with `samestep run`, or `accelerate launch --config_file accelerate_configs/NAME.yaml` without --cpu"
        )
    if "LOCAL_RANK" not in environ and {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= environ.keys():
        # what simple_launcher of accelerate 1.15 leaves for each of several processes, of which it starts one
        raise BackendError(
            "asked for several processes, but this one has no rank (LOCAL_RANK is not set) and would train alone: accelerate launches one "
            "under --cpu, MULTI_CPU or `use_cpu: true` without MPI; start with `samestep run --processes N`, or with "
            "`--config_file accelerate_configs/ddp.yaml`; for one process unset MASTER_PORT"
        )
    return Request(
        backend=backend,
        precision=precision,
        world_size=world_size,
        on_cpu=_is_true(environ, "ACCELERATE_USE_CPU"),
        offload=_asks_for_offload(backend, environ),
    )


def _backend_name(environ: Mapping[str, str]) -> str:
    if _is_true(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise BackendError(
            "the accelerate configuration asks for Megatron-LM, which samestep does not run; use fsdp or zero3"
        )
    if _is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file != "none":
            raise BackendError(
                f"deepspeed_config.deepspeed_config_file ({file}) is not supported: samestep writes DeepSpeed's settings itself; "
                "leave it out, and set deepspeed_config.zero_stage as in accelerate_configs/zero2.yaml"
            )
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2", "3"):
            raise BackendError(
                f"deepspeed_config.zero_stage ({stage}) must be 1, 2 or 3; for plain data parallelism use ddp"
            )
        if stage == "3" and _is_true(environ, "ACCELERATE_DEEPSPEED_ZERO3_INIT"):
            raise BackendError(
                "deepspeed_config.zero3_init_flag (true) is not supported: new weights would be drawn per shard, and differ from "
                "every other backend's; set it to false"
            )
        return f"zero{stage}"
    if _is_true(environ, "ACCELERATE_USE_FSDP"):
        version = environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise BackendError(f"fsdp_config.fsdp_version ({version}) must be 2; FSDP1 is not supported")
        return "fsdp"
    return "ddp" if "LOCAL_RANK" in environ else "single"


def _asks_for_offload(backend: str, environ: Mapping[str, str]) -> bool:
    if backend == "fsdp":
        return _is_true(environ, "FSDP_OFFLOAD_PARAMS")
    if not backend.startswith("zero"):
        return False
    devices = {what: environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none") for what in OFFLOADS}
    for what, device in devices.items():
        field = f"deepspeed_config.offload_{what}_device ({device})"
        if device not in ("none", "cpu"):
            raise BackendError(f"{field} is not supported; use cpu or none")
        if device == "cpu" and backend not in OFFLOADS[what]:
            stages = " or ".join(name.removeprefix("zero") for name in OFFLOADS[what])
            raise BackendError(
                f"{field} needs deepspeed_config.zero_stage {stages}, and it is {backend.removeprefix('zero')}; set it to none"
            )
    return "cpu" in devices.values()


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes")
