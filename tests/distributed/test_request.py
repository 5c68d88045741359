"""The launcher's environment names the backend, and what cannot run is refused by name."""

from pathlib import Path

import pytest

from tests.rank_pool import BACKEND_ENV, run_ranks
from trainer.backend import build_accelerator
from trainer.backend.build import check_attention, check_devices
from trainer.backend.request import read_request
from trainer.config import ModelConfig, RunConfig, TrainConfig
from trainer.errors import BackendError, ConfigError

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
RANKED = {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize("backend", [name for name in BACKEND_ENV if name != "single"])
def test_the_environment_names_the_backend(backend: str) -> None:
    request = read_request(BACKEND_ENV[backend] | RANKED | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert request.backend == backend.removesuffix("_offload")
    assert request.offload == backend.endswith("_offload")
    assert (request.world_size, request.precision) == (2, "bf16")


def test_an_empty_environment_is_single_in_fp32() -> None:
    request = read_request({})
    assert (request.backend, request.world_size, request.precision, request.on_cpu) == ("single", 1, "no", False)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, r"mixed precision \(fp8\) must be one of no, bf16, fp16"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"fsdp_version \(1\) must be 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"fsdp_version \(1\) must be 2"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            r"zero_stage \(0\) must be 1, 2 or 3",
        ),
        (
            BACKEND_ENV["zero3"] | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
            r"zero3_init_flag \(true\) is not supported",
        ),
        (
            BACKEND_ENV["zero3"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            r"offload_param_device \(nvme\) is not supported; use cpu",
        ),
        (
            BACKEND_ENV["zero1"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            r"offload_optimizer_device \(cpu\) needs deepspeed_config.zero_stage 2 or 3, and it is 1; set it to none",
        ),
        (
            BACKEND_ENV["zero2_offload"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            r"offload_param_device \(cpu\) needs deepspeed_config.zero_stage 3, and it is 2; set it to none",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "stage3.json"},
            r"deepspeed_config_file \(stage3.json\) is not supported.*set deepspeed_config.zero_stage",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_what_cannot_run_is_refused_by_name(environ: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        read_request(environ | RANKED)


def refused(error: type[Exception], global_batch_size: int) -> str:
    """The message with which this rank's build_accelerator stops."""
    try:
        build_accelerator(RunConfig(name="t", train=TrainConfig(max_steps=1, global_batch_size=global_batch_size)))
    except error as problem:
        return str(problem)
    return "ran"


def test_deepspeed_that_would_run_as_lone_processes_is_refused() -> None:
    # without a rank in the environment Accelerate 1.15 starts N unrelated runs
    environ = BACKEND_ENV["zero2"] | {"WORLD_SIZE": "2"}
    messages = run_ranks(refused, "single", 1, args=(BackendError, 8), environ=environ)
    assert "asked for zero2 with 2 process(es), but this process has no rank" in messages[0]


def test_fsdp_without_ranks_is_refused_and_not_run_as_something_else() -> None:
    messages = run_ranks(refused, "single", 1, args=(BackendError, 8), environ=BACKEND_ENV["fsdp"])
    assert "asked for fsdp with 1 process(es), but this process has no rank" in messages[0]


@pytest.mark.parametrize("options", [("--cpu", "--num_processes=2"), ("--cpu", "--config_file=fsdp.yaml")])
def test_several_processes_of_which_accelerate_starts_one_are_refused(options: tuple[str, ...]) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    words = [option.replace("fsdp.yaml", str(CONFIGS / "fsdp.yaml")) for option in options]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "recipe.py"]))
    _, environ = prepare_simple_launcher_cmd_env(parsed)
    launched = {name: value for name, value in environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    with pytest.raises(BackendError, match="asked for several processes, but this one has no rank"):
        read_request(launched)
    parsed.num_processes = 1
    _, alone = prepare_simple_launcher_cmd_env(parsed)
    assert (
        read_request({name: alone[name] for name in alone.keys() & launched.keys() if name[:7] != "MASTER_"}).world_size
        == 1
    )


@pytest.mark.parametrize(("processes", "devices"), [("4", 2), ("1", 0)])
def test_more_processes_than_devices_are_refused_where_all_see_the_same_ones(processes: str, devices: int) -> None:
    environ = {"LOCAL_WORLD_SIZE": processes}
    words = rf"LOCAL_WORLD_SIZE \({processes}\).* at most {devices},.* --num_processes {devices}, or hide .*CUDA_VISIBLE_DEVICES="
    with pytest.raises(BackendError, match=words):
        check_devices(environ | {"TORCHELASTIC_RUN_ID": "none"}, devices)
    check_devices(environ | {"TORCHELASTIC_RUN_ID": "none"}, int(processes))
    check_devices(environ, devices)  # srun may show each process its own


def flash_attention() -> str:
    """The message with which a run in fp32 stops."""
    try:
        build_accelerator(
            RunConfig(name="t", model=ModelConfig(attention="flash_attention_2"), train=TrainConfig(max_steps=1))
        )
    except ConfigError as problem:
        return str(problem)
    return "ran"


def test_flash_attention_in_fp32_is_refused_before_a_model_loads() -> None:
    (message,) = run_ranks(flash_attention, "single", 1)
    assert (
        "model.attention (flash_attention_2) computes in bf16 or fp16 alone" in message
        and "--precision bf16" in message
    )
    check_attention("flash_attention_2", "bf16")
    check_attention("sdpa", "no")


def test_a_global_batch_smaller_than_the_ranks_is_refused_on_all_of_them() -> None:
    for message in run_ranks(refused, "ddp", 3, args=(ConfigError, 2)):
        assert "train.global_batch_size (2) is smaller than the number of processes (3)" in message
