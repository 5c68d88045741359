"""How each backend wraps a model: what is sharded together, in which precision, and the proof that it happened."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trainer.backend.request import Request
from trainer.errors import BackendError

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own default; 2 GB in fp32, so smaller models get smaller buckets


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks, of an encoder and of a decoder too."""
    return list(chain.from_iterable(block_stacks(model)))


def block_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The ModuleLists of one class that together hold the most parameters: one, or those of an encoder and a decoder.

    `_no_split_modules` is not enough: it names too much for tied embeddings (BertForMaskedLM) and nothing for XLNet.
    """
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0 and len({type(b) for b in m}) == 1
    ]
    sized = [(sum(p.numel() for p in blocks.parameters()), blocks) for blocks in lists]
    if not sized:
        return []
    largest = max(size for size, _ in sized)
    inside: set[int] = set(chain.from_iterable((id(m) for b in blocks for m in b.modules()) for _, blocks in sized))
    outer = [(size, blocks) for size, blocks in sized if id(blocks) not in inside]
    return [blocks for size, blocks in outer if size * 4 >= largest]


def modules_sharing_parameters(model: nn.Module) -> list[list[nn.Module]]:
    """Groups of modules that own the same parameter (tied embeddings, tied biases), outermost module of each only."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    groups: list[set[nn.Module]] = []
    for shared in (set(modules) for modules in owners.values() if len(modules) > 1):
        touching = [group for group in groups if group & shared]
        groups = [group for group in groups if group not in touching] + [shared.union(*touching)]
    order = {module: position for position, module in enumerate(model.modules())}
    return [sorted(_outermost(group), key=order.__getitem__) for group in groups]


def _outermost(group: set[nn.Module]) -> list[nn.Module]:
    return [m for m in group if not any(other is not m and m in set(other.modules()) for other in group)]


def shard(accelerator: Accelerator, model: nn.Module) -> None:
    """FSDP2: one group per block, one per set of modules that share a parameter, the rest in the root's. In place.

    Done here and not by `accelerator.prepare`, which leaves a sharded model alone: it splits BertForMaskedLM's tied bias over
    two groups and fails (accelerate 1.15, fsdp2_prepare_model). Weights are gathered and reduced in fp32. Gathering in bf16
    (`MixedPrecisionPolicy(param_dtype=bf16)`) would halve the traffic, but it rounds the weights of norms too: measured on a small BERT,
    gradients end 1.9 x as far from fp32 as single's, with fp32 gathers 1.0 x (the limit is 1.5 x).
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    blocks = repeated_blocks(model)
    _check_named_blocks(plugin.transformer_cls_names_to_wrap, blocks)
    plugin.auto_wrap_policy = None  # prepare would look for block classes, which are renamed once sharded
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    policy = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda") if offload else OffloadPolicy()
    if not offload:
        model.to(accelerator.device)
    for group in modules_sharing_parameters(model):
        fully_shard(group, reshard_after_forward=False, offload_policy=policy)
    for block in blocks:
        fully_shard(block, reshard_after_forward=bool(plugin.reshard_after_forward), offload_policy=policy)
    fully_shard(model, offload_policy=policy)
    assert all(isinstance(module, FSDPModule) for module in (model, *blocks))


def _check_named_blocks(named: Sequence[str] | None, blocks: Sequence[nn.Module]) -> None:
    """BackendError where the accelerate configuration names other block classes than those that are wrapped."""
    ours = sorted({type(block).__name__ for block in blocks})
    if named and sorted(named) != ours:
        raise BackendError(
            f"fsdp_config.fsdp_transformer_layer_cls_to_wrap ({','.join(named)}) must be this model's repeated blocks, "
            f"{','.join(ours)}, which samestep finds by itself; leave it out"
        )


def rebind(optimizer: torch.optim.Optimizer, model: nn.Module, names: list[list[str]]) -> None:
    """Point the optimizer's groups at the model's present parameters by name. In place.

    `accelerator.prepare` does so by address, which is 0 for every empty shard (first dimension smaller than the world size).
    """
    parameters = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in members]


def names_by_group(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each optimizer group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def configure_zero(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Write samestep's settings into the DeepSpeed configuration before `prepare` reads it."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = settings["zero_optimization"]
    zero |= zero_buckets(
        num_parameters=sum(p.numel() for p in model.parameters()),
        hidden_size=getattr(model.config, "hidden_size", 1024),
        stage=zero["stage"],
    )
    if accelerator.device.type == "cpu":
        zero["overlap_comm"] = False  # there are no streams to overlap on
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # required where no loader is prepared; only DeepSpeed's own sample counter reads it
        "gradient_accumulation_steps": 1,  # ours: Engine.micro_batch sets the boundary, Trainer scales the loss
        "gradient_clipping": 0.0,  # ours: ZeroEngine.step says what to clip to
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also under offload: one optimizer, the same numbers
        "steps_per_print": None,
    }
    if precision != "no":
        # An empty list keeps every parameter's communication in fp32; the default reduces the gradients of Linear layers in bf16.
        dtype = str(COMPUTE_DTYPES[precision])
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}


def zero_buckets(*, num_parameters: int, hidden_size: int, stage: int) -> dict[str, int]:
    """Sizes in elements. DeepSpeed's default of 5e8 takes 2 GB per bucket in fp32, whatever the model."""
    bucket = max(min(MAX_BUCKET_ELEMENTS, num_parameters), 1)
    bucket += bucket % 2  # DeepSpeed 0.19 refuses an odd one for stages 1 and 2
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        sizes["stage3_prefetch_bucket_size"] = min(bucket, 10 * hidden_size * hidden_size)
        sizes["stage3_param_persistence_threshold"] = 10 * hidden_size  # norms and biases stay whole on every rank
    return sizes


def verify_wrapper(request: Request, wrapped: nn.Module, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Raise BackendError unless `wrapped` is what the backend asked for makes of a model with these parameter names."""
    found = describe_wrapper(wrapped)
    if found != request.backend:
        raise BackendError(
            f"asked for {request.backend}, but the model was wrapped as {found}; "
            "this is a defect of samestep or of an unsupported Accelerate version: compare with launch/constraints.txt"
        )
    kept = Counter(strip_wrapper(name) for name, _ in wrapped.named_parameters())
    if kept != Counter(names):
        lost = sorted(set(names) ^ set(kept))[:3]
        raise BackendError(
            f"{request.backend} changed the model's parameters while wrapping it, such as {', '.join(lost)}"
        )
    if not request.backend.startswith("zero"):  # ZeRO's optimizer holds flat buffers of its own
        held, owned = (
            {id(p) for g in optimizer.param_groups for p in g["params"]},
            {id(p) for p in wrapped.parameters()},
        )
        if not held <= owned:
            raise BackendError(
                f"{request.backend}: {len(held - owned)} of the optimizer's parameters are not the model's any more"
            )
    wrong = [name for name, p in wrapped.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        dtype = str(wrapped.get_parameter(wrong[0]).dtype).removeprefix("torch.")
        raise BackendError(
            f"{request.backend}: trainable parameters must be fp32 masters, but {wrong[0]} is {dtype}; there is no pure-bf16 training: "
            "leave the weights in fp32, and compute in bf16 by mixed_precision: bf16 of the accelerate configuration"
        )
    if request.offload and not is_offloaded(wrapped, optimizer):
        raise BackendError(f"asked for {request.backend} with CPU offload, but its state stays on the device")


def verify_precision(request: Request, wrapped: Any, device_type: str) -> None:
    """Raise BackendError unless a forward pass would compute in the precision asked for.

    DeepSpeed's own switch counts, as it overrules the autocast around it; torch's only warns where a device lacks a dtype.
    """
    if request.backend.startswith("zero"):
        found = wrapped.torch_autocast_dtype() if wrapped.torch_autocast_enabled() else torch.float32
    else:
        with autocast(request.precision, device_type):
            one = torch.ones(1, 1, device=device_type)
            found = (one @ one).dtype
    if found != COMPUTE_DTYPES[request.precision]:
        raise BackendError(
            f"asked for mixed precision ({request.precision}), but {request.backend} on {device_type} would compute in {found}; "
            "choose another with --mixed_precision"
        )


def autocast(precision: str, device_type: str) -> torch.autocast:
    """Surrounds the forward pass: matrices are multiplied in the precision asked for."""
    return torch.autocast(device_type, dtype=COMPUTE_DTYPES[precision], enabled=precision != "no")


def is_offloaded(wrapped: nn.Module, optimizer: Any) -> bool:
    """Whether state lives in host memory, read from the objects themselves."""
    if hasattr(wrapped, "zero_optimization_stage"):
        return any(getattr(optimizer, name, False) for name in ("cpu_offload", "offload_optimizer", "offload_param"))
    return all(parameter.device.type == "cpu" for parameter in wrapped.parameters())


def describe_wrapper(wrapped: Any) -> str:
    """The backend whose wrapper this module wears, read from the objects themselves."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return "ddp"
    if isinstance(wrapped, FSDPModule) and isinstance(wrapped, nn.Module):
        blocks = repeated_blocks(wrapped)
        sharded = all(isinstance(block, FSDPModule) for block in blocks)
        return "fsdp" if sharded and all(is_dtensor(p) for p in wrapped.parameters()) else "fsdp with unsharded parts"
    if hasattr(wrapped, "zero_optimization_stage"):
        return f"zero{wrapped.zero_optimization_stage()}"
    return "single"


def is_dtensor(parameter: Any) -> bool:
    """Whether FSDP2 holds this parameter as a shard."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def strip_wrapper(name: str) -> str:
    """The parameter's name in the unwrapped model (DDP and DeepSpeed put `module.` before it)."""
    return name.removeprefix("module.")
