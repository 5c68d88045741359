"""What an accelerate configuration sets beside the backend: accelerate's own files run, and what would be overridden is refused by name."""

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from launch.command import backend_file, backend_names
from tests.distributed.loop_runs import make_config, train
from tests.distributed.test_request import RANKED, refused
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend.request import read_request
from trainer.backend.settings import setting_problems
from trainer.config import OptimConfig, RunConfig, TrainConfig
from trainer.errors import BackendError

COMMON = """
compute_environment: LOCAL_MACHINE
debug: false
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
WRITTEN = {
    "zero2": """
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
""",
    "zero3": """
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: cpu
  zero3_init_flag: false
  zero3_save_16bit_model: false
  zero_stage: 3
""",
    "fsdp": """
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
""",
}
"""Files as `accelerate config` writes them, with its own defaults where it has any (accelerate 1.15, commands/config/cluster.py)."""


def environment(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` would put into each rank's environment."""
    args = launch_command_parser().parse_args(["--config_file", str(file), "--main_process_port", "0", "recipe.py"])
    _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # as launch_command does before
        return prepare_deepspeed_cmd_env(args)[1] | RANKED
    return prepare_multi_gpu_env(args) | RANKED


def run(*, batch: int = 32, micro: int | None = None, norm: float | None = 1.0) -> RunConfig:
    return RunConfig(
        name="t",
        optim=OptimConfig(max_grad_norm=norm),
        train=TrainConfig(max_steps=1, global_batch_size=batch, micro_batch_size=micro),
    )


@pytest.mark.parametrize("backend", WRITTEN)
def test_a_file_of_accelerates_own_questionnaire_runs(backend: str, tmp_path: Path) -> None:
    file = tmp_path / "default_config.yaml"
    file.write_text(COMMON + WRITTEN[backend])
    environ = environment(file)
    request = read_request(environ)
    assert (request.backend, request.precision, request.offload) == (backend, "bf16", backend == "zero3")
    assert setting_problems(environ, run(micro=4), 2) == []


@pytest.mark.parametrize("backend", [name for name in backend_names() if name not in ("single", "ddp")])
def test_the_shipped_files_set_nothing_that_is_overridden(backend: str) -> None:
    environ = environment(backend_file(backend))
    assert read_request(environ).offload == backend.endswith("_offload")
    assert setting_problems(environ, run(micro=4, norm=None), 2) == []


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            r"gradient_clipping \(0\.5\) must be optim\.max_grad_norm \(1\.0\), .* set optim\.max_grad_norm=0\.5",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            r"gradient_accumulation_steps \(8\) must be what follows .*, 4; leave it out, and set train\.micro_batch_size=2",
        ),
        *(  # accelerate ends in a traceback over these
            ({name: value}, rf"{field} \({value}\) must be a .*number")
            for name, field, value in (
                ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "auto"),
                ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "2.0"),
                ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "0"),
                ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "none"),
                ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "abc"),
            )
        ),
        ({"FSDP_AUTO_WRAP_POLICY": "size_based_wrap"}, r"fsdp_auto_wrap_policy \(size_based_wrap\) is not supported"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, r"fsdp_auto_wrap_policy \(SIZE_BASED_WRAP\) is not supported"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"set it to false, and model\.gradient_checkpointing=true"),
        ({"FSDP_IGNORED_MODULES": "head"}, r"fsdp_ignored_modules \(head\) is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, r"parallelism_config is not supported: .*; leave it out"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            r"dynamo_config\.dynamo_backend \(INDUCTOR\) is not supported: .*; leave it out",
        ),
    ],
)
def test_a_setting_that_would_be_overridden_is_named(environ: dict[str, str], message: str) -> None:
    (problem,) = setting_problems(environ, run(micro=4), 2)
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    "environ",
    [
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"ACCELERATE_GRADIENT_CLIPPING": "auto", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
        {"ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    ],
)
def test_a_value_equal_to_the_runs_own_is_no_conflict(environ: dict[str, str]) -> None:
    assert setting_problems(environ, run(micro=4), 2) == []


def test_no_clipping_is_written_as_zero() -> None:
    assert setting_problems({"ACCELERATE_GRADIENT_CLIPPING": "0.0"}, run(norm=None), 2) == []
    assert "set optim.max_grad_norm=none" in setting_problems({"ACCELERATE_GRADIENT_CLIPPING": "0.0"}, run(), 2)[0]


def test_all_conflicts_stop_every_rank_together_before_a_model_loads() -> None:
    environ = {"ACCELERATE_GRADIENT_CLIPPING": "0.5", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}
    for message in run_ranks(refused, "zero2", 2, args=(BackendError, 8), environ=environ):
        assert "gradient_clipping (0.5)" in message and "gradient_accumulation_steps (3)" in message


def test_a_new_head_is_whole_on_every_rank_where_accelerate_would_load_weights_on_one(tmp_path: Path) -> None:
    """`accelerate launch` sets the variable for a file that does not name it (accelerate 1.15, utils/launch.py)."""
    tiny_bert(tmp_path / "model")
    tiny_sentences(tmp_path / "data.csv", rows=160)
    config = make_config(tmp_path, tmp_path / "run", method="full", max_steps=2)
    environ = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for (facts,) in run_ranks(train, "fsdp", 2, args=([(config, None)],), environ=environ):
        assert (facts["error"], facts["step"]) == (None, 2)
