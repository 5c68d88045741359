"""From the request to a running Accelerator, and from model and optimizer to a verified Engine. All ranks call both."""

import ctypes
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from trainer.backend import wrap
from trainer.backend.engine import Engine
from trainer.backend.heartbeat import PATIENCE
from trainer.backend.request import Request, read_request
from trainer.backend.settings import setting_problems
from trainer.backend.side import NEVER
from trainer.backend.torch_engines import FsdpEngine, PlainEngine
from trainer.backend.zero_engine import ZeroEngine
from trainer.checkpoint.resume import Start, decide_start
from trainer.config import RunConfig, check_world
from trainer.errors import AlreadyFinished, BackendError, ConfigError, SamestepError
from trainer.quiet import quiet_libraries, quiet_prints

EXPECTED_TYPES = {
    "single": (DistributedType.NO,),
    "ddp": (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU, DistributedType.MULTI_NPU),
    "fsdp": (DistributedType.FSDP,),
    "zero1": (DistributedType.DEEPSPEED,),
    "zero2": (DistributedType.DEEPSPEED,),
    "zero3": (DistributedType.DEEPSPEED,),
}

SHORTEST_TIMEOUT_S = 1800.0
"""Of a process group, as torch gives gloo's: no watchdog runs yet where ranks meet and read their data."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def build_accelerator(config: RunConfig) -> Accelerator:
    """The Accelerator of this process, of the backend the launcher asked for, on GPU or CPU. Every rank calls it once, first.

    Before a model loads it raises ConfigError where the global batch cannot be shared over the ranks or the run directory holds a run
    of other settings, BackendError where another backend would run, AlreadyFinished where there is nothing left to do.
    """
    quiet_libraries()
    request = read_request(os.environ)
    problems = check_world(config, request.world_size)
    if problems:
        raise ConfigError(*problems)
    use_cpu = request.on_cpu or not torch.accelerator.is_available()
    check_optimizer(config.optim.name, request, use_cpu=use_cpu)
    check_bf16(request, use_cpu=use_cpu)
    check_attention(config.model.attention, request.precision)
    if not use_cpu:
        check_devices(os.environ, torch.accelerator.device_count())
    problems = setting_problems(os.environ, config, request.world_size)
    if problems:
        raise BackendError("\n".join(problems))
    timeout = group_timeout(config.train.hang_timeout_s)
    if request.backend == "fsdp":
        # `accelerate launch` turns it on unasked: transformers would load on local rank 0 alone, and leave new weights unset elsewhere.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if use_cpu:
        _prepare_cpu_process_group(request, timeout)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not, and torch refuses
    torch.use_deterministic_algorithms(config.train.deterministic)
    # Precision is ours (Engine.forward): left to their defaults the backends mean three different things by bf16.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=config.train.ddp_find_unused_parameters,
    )
    with quiet_prints("deepspeed"):
        accelerator = Accelerator(
            mixed_precision="no",
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=timeout)],
            step_scheduler_with_optimizer=False,
        )
    if request.backend == "zero3":
        _load_models_whole(accelerator)
    verify_accelerator(accelerator, request)
    agree_on_start(config)
    return accelerator


def group_timeout(hang_timeout_s: float | None) -> timedelta:
    """Of the process groups: longer than any phase that the watchdog permits, so that it is the one to end a hung job and name the rank."""
    if hang_timeout_s is None:
        return NEVER
    longest_s = max(hang_timeout_s * (PATIENCE + 1), SHORTEST_TIMEOUT_S)
    return timedelta(seconds=min(longest_s, NEVER.total_seconds()))


def check_optimizer(name: str, request: Request, *, use_cpu: bool) -> None:
    """ConfigError for an optimizer of bitsandbytes where it cannot run as it says."""
    if name != "adamw" and request.backend not in ("single", "ddp"):
        raise ConfigError(
            f"optim.name ({name}) keeps the moments of whole parameters in blocks, which {request.backend} shards; "
            "use optim.name=adamw, or run on single or ddp"
        )
    if name.startswith("paged") and use_cpu:
        raise ConfigError(
            f"optim.name ({name}) moves moments between GPU and host memory, and this run has no GPU; use adamw or adamw_8bit"
        )


def check_bf16(request: Request, *, use_cpu: bool) -> None:
    """BackendError for bf16 on a GPU that would only emulate it, many times slower than fp32."""
    on_cuda = not use_cpu and torch.cuda.is_available()
    if request.precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise BackendError(
            "mixed precision (bf16): this GPU does not compute in bf16; start with --mixed_precision fp16 or no"
        )


def check_attention(attention: str, precision: str) -> None:
    """ConfigError for a kernel that cannot compute in the run's precision."""
    if attention == "flash_attention_2" and precision == "no":
        raise ConfigError(
            f"model.attention ({attention}) computes in bf16 or fp16 alone, and this run is in fp32; start with --precision bf16 "
            "(accelerate launch: --mixed_precision bf16), or use model.attention=sdpa"
        )


def check_devices(environ: Mapping[str, str], num_devices: int) -> None:
    """BackendError where torchrun or `accelerate launch` started more processes here than there are devices; NCCL would only hang or crash.

    Other launchers may show each process a device of its own.
    """
    processes = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in environ and processes > num_devices:
        raise BackendError(
            f"LOCAL_WORLD_SIZE ({processes}), the processes on this machine, must be at most {num_devices}, as many as it has devices: "
            f"each needs its own; start with --num_processes {num_devices}, or hide the GPUs to train on the CPU: CUDA_VISIBLE_DEVICES="
        )


def agree_on_start(config: RunConfig) -> Start:
    """How the run begins, as rank 0 sees its folder; the same on all ranks, errors too. Collective."""
    start: list[Start | SamestepError | None] = [None]
    if PartialState().is_main_process:
        try:
            start = [decide_start(config)]
        except SamestepError as error:
            start = [error]
        except OSError as error:
            start = [ConfigError(f"run_dir ({config.folder}) cannot be read: {error.strerror or error}")]
    if PartialState().num_processes > 1:
        broadcast_object_list(start)
    found = start[0]
    if isinstance(found, SamestepError):
        raise found
    assert found is not None
    if found.kind == "finished":
        raise AlreadyFinished(found.words)
    return found


def build_engine(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Wrap model and optimizer for the backend and verify the result. Every rank calls it once.

    The optimizer must have been made from the parameters of `model`; its groups keep their order and extra keys.
    """
    request = read_request(os.environ)
    names = [name for name, _ in model.named_parameters()]
    groups = wrap.names_by_group(optimizer, model)
    if request.backend == "fsdp":
        wrap.shard(accelerator, model)
        wrap.rebind(optimizer, model, groups)
    elif request.backend.startswith("zero"):
        wrap.configure_zero(accelerator, model, request.precision)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if request.backend.startswith("zero"):
        _give_time(cast(Any, accelerator).init_handler.timeout)
    if request.backend == "fsdp":
        wrap.rebind(prepared.optimizer, wrapped, groups)
    wrap.verify_wrapper(request, wrapped, prepared.optimizer, names)
    wrap.verify_precision(request, wrapped, accelerator.device.type)
    kind = {"single": PlainEngine, "ddp": PlainEngine, "fsdp": FsdpEngine}.get(request.backend, ZeroEngine)
    return kind(request=request, accelerator=accelerator, model=wrapped, optimizer=prepared.optimizer)


def verify_accelerator(accelerator: Accelerator, request: Request) -> None:
    """Raise BackendError unless Accelerate's state is what the launcher was asked for."""
    if accelerator.distributed_type not in EXPECTED_TYPES[request.backend]:
        raise BackendError(
            f"asked for {request.backend}, but Accelerate would run {accelerator.distributed_type.value}; "
            f"start with `samestep run RECIPE --backend {request.backend}`, or check the accelerate configuration"
        )
    if accelerator.num_processes != request.world_size:
        raise BackendError(
            f"the launcher started {request.world_size} processes, but this process group has {accelerator.num_processes}; "
            "start through `samestep run` or `accelerate launch`, and check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE"
        )


def _give_time(timeout: timedelta) -> None:
    """Set the timeout of every process group: DeepSpeed 0.19 reduces over a copy of ours that has torch's default (utils/groups.py)."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _prepare_cpu_process_group(request: Request, timeout: timedelta) -> None:
    """gloo ranks before Accelerator() exists; without this Accelerate silently runs DDP for FSDP, and N lone runs for DeepSpeed.

    Accelerate 1.15 reaches its FSDP2 branch only from a MULTI_* accelerator type (accelerate/state.py, AcceleratorState); this can go
    when it accepts MULTI_CPU there.
    """
    os.environ.pop("ACCELERATE_USE_CPU", None)  # would make Accelerate ignore DeepSpeed
    if request.backend.startswith("zero"):
        _leave_out_inference_kernel()
    PartialState(cpu=True, timeout=timeout)
    if request.backend == "fsdp":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of giving them back: FSDP2 gathers every block anew, and fresh pages cost more than the gather.

    With 135M parameters on 2 ranks a step took 1.9 s instead of 2.3 s, and varied less (tests/bench/bench_checkpoint.py). Without glibc
    nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, num_bytes in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(option, num_bytes)


def _leave_out_inference_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce, which only inference calls (deepspeed 0.19, comm/torch.py).

    Training does without it; building it takes 30 s, and a process killed while it loads leaves a lock file in torch's extension cache
    for which every later run waits without end.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _load_models_whole(accelerator: Accelerator) -> None:
    """Keep transformers from sharding a model while it is built, which it does whenever Accelerate has a ZeRO-3 configuration.

    Weights drawn per shard would differ from every other backend's, and `from_config` of a model with a padding index fails under it
    (transformers 5.23, modeling_utils._init_weights: index 0 is out of bounds). `prepare` shards the model all the same.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    accelerator.state.deepspeed_plugin.dschf = None
