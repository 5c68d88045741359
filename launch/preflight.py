"""Checks before anything is launched: recipe, settings, backend, data, layer names.

One process, no weights; every problem is reported at once.
"""

import gc
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from launch.command import RunOptions, backend_names
from launch.parity_plan import Variant
from trainer.checkpoint.resume import decide_start
from trainer.config import PRECISIONS, RunConfig
from trainer.errors import ConfigError, SamestepError
from trainer.quiet import quiet_libraries
from trainer.resolve import try_resolve
from trainer.resolve.build import Attempt
from trainer.resolve.inputs import input_problems
from trainer.resolve.suggest import nearest_word

RECIPE_FOLDER = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Machine:
    """What matters of the machine a run starts on."""

    num_gpus: int
    has_bf16: bool
    has_deepspeed: bool


def check_run(options: RunOptions) -> RunConfig:
    """The settings of a run on this machine. Raises ConfigError with the problems of all checks, if there are any."""
    return checked(options, this_machine())


def check_job(options: RunOptions) -> RunConfig:
    """The same for a job on several nodes; processes counts the ranks on all of them, of which this node has its share."""
    machine = this_machine()
    return checked(options, replace(machine, num_gpus=(options.processes or 1) if machine.num_gpus else 0))


def checked(options: RunOptions, machine: Machine) -> RunConfig:
    """The settings, if nothing is wrong with them, the backend, the inputs and the run directory."""
    quiet_libraries()
    done = options.complete()
    assert done.processes is not None
    problems = [*backend_problems(done, machine), *recipe_problems(done, done.processes)]
    problems = problems or start_problems(done)
    if problems:
        raise ConfigError(*problems)
    found = try_recipe(done, done.processes).resolved
    assert found is not None
    return found.config


def check_submission(tasks: Sequence[RunOptions], world_sizes: Sequence[int], *, on_gpus: bool) -> None:
    """The same for a Slurm job, from a login node, whose own GPUs do not matter.

    tasks: of an array, each with its settings. world_sizes: the fewest and the most ranks it may start with.
    """
    quiet_libraries()
    deepspeed = this_machine().has_deepspeed
    problems: list[str] = []
    for count in world_sizes:
        machine = Machine(num_gpus=count if on_gpus else 0, has_bf16=True, has_deepspeed=deepspeed)
        problems += backend_problems(replace(tasks[0], processes=count).complete(), machine)
    for task in tasks:
        problems += recipe_problems(task, max(world_sizes, default=1)) or start_problems(task)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def check_parity(options: RunOptions, variants: Sequence[Variant]) -> None:
    """The same for all variants of `samestep parity`."""
    quiet_libraries()
    machine = this_machine()
    problems = [problem for variant in variants for problem in backend_problems(variant.run_options(options), machine)]
    size = variants[0].global_batch
    problems += recipe_problems(options, max(variant.processes for variant in variants) if size is None else 1)
    if size is not None:
        problems += split_problems(options, size)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def split_problems(options: RunOptions, global_batch: int) -> list[str]:
    """Sizes that a file or the command line sets and --split would overrule. Nothing where the recipe itself cannot be read."""
    try:
        resolved = try_recipe(options, 1).resolved
    except ConfigError:
        return []
    problems = []
    for name, implied in (("global_batch_size", global_batch), ("micro_batch_size", None)):
        size = getattr(resolved.config.train, name) if resolved else implied
        source = resolved.sources[f"train.{name}"] if resolved else ""
        if size != implied and source not in ("default", "recipe"):
            result = f" and makes it {implied}" if implied else ""
            problems.append(f"train.{name} ({size}) by {source}: --split decides it{result}; leave one of the two out")
    return problems


def recipe_problems(options: RunOptions, world_size: int) -> list[str]:
    """Problems with the recipe, its settings, and the data and model that they name."""
    try:
        attempt = try_recipe(options, world_size)
    except ConfigError as error:
        return list(error.problems)
    if attempt.resolved is None:
        return list(attempt.problems)
    return [*attempt.problems, *input_problems(attempt.resolved.config, attempt.problems)]


def start_problems(options: RunOptions) -> list[str]:
    """Why the run directory does not let this run start or continue; nothing where the settings are wrong anyhow."""
    try:
        attempt = try_recipe(options, 1)
        if attempt.resolved is not None:
            decide_start(attempt.resolved.config)
    except ConfigError as error:
        return list(error.problems)
    except SamestepError as error:
        return [str(error)]
    return []


def try_recipe(options: RunOptions, world_size: int) -> Attempt:
    """The recipe's settings with files and overrides. ConfigError for a file that is no recipe."""
    defaults = load_recipe(options.recipe).DEFAULTS
    return try_resolve(type(defaults), defaults, options.configs, options.overrides, world_size)


def load_recipe(path: Path) -> ModuleType:
    """Import a recipe from its file. Raises ConfigError unless it defines DEFAULTS and main.

    Its own bugs keep their traceback.
    """
    if not path.is_file():
        raise ConfigError(f"recipe ({path}): there is no such file; {_recipe_fix(path)}")
    try:
        module = _import_file(path)
    except ValidationError as error:
        raise ConfigError(*_recipe_problems(path, error)) from None
    if not isinstance(getattr(module, "DEFAULTS", None), RunConfig) or not callable(getattr(module, "main", None)):
        raise ConfigError(
            f"recipe ({path}): must define DEFAULTS = RunConfig(...) and main(config); start from recipes/lora_sst2.py"
        )
    return module


def backend_problems(options: RunOptions, machine: Machine) -> list[str]:
    """Why this backend, number of processes or precision cannot run on this machine."""
    backend, processes = options.backend or "", 1 if options.processes is None else options.processes
    if backend not in backend_names():
        near = nearest_word(backend, backend_names())
        names = ", ".join(backend_names())
        return [
            f"--backend ({backend}): must be one of {names}" + (f"; did you mean {near}?" if near else "; choose one")
        ]
    problems = [_process_problem(backend, processes, machine), _precision_problem(options.precision, machine)]
    if backend.startswith("zero"):
        problems.append(_deepspeed_problem(backend, machine))
    return [problem for problem in problems if problem]


def this_machine() -> Machine:
    """Look at the machine; imports torch."""
    import torch

    on_gpu = torch.accelerator.is_available()
    return Machine(
        num_gpus=torch.accelerator.device_count() if on_gpu else 0,
        has_bf16=not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
    )


def _process_problem(backend: str, processes: int, machine: Machine) -> str | None:
    if processes < 1:
        return f"--processes ({processes}): must be at least 1; set --processes 1"
    if backend == "single" and processes > 1:
        return (
            f"--backend single runs one process, and {processes} were asked for; choose --backend ddp, or ask for one"
        )
    if backend != "single" and processes == 1 and not machine.num_gpus:
        return (
            f"--backend ({backend}): on CPU it needs at least 2 processes, or accelerate would run something else; "
            "ask for 2, or choose --backend single"
        )
    if machine.num_gpus and processes > machine.num_gpus:
        return (
            f"--processes ({processes}): this machine has {machine.num_gpus} GPUs, one for each process; "
            f"set --processes {machine.num_gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPU"
        )
    return None


def _precision_problem(precision: str, machine: Machine) -> str | None:
    if precision not in PRECISIONS:
        return f"--precision ({precision}): must be one of {', '.join(PRECISIONS)}; no is fp32"
    if precision == "fp16" and not machine.num_gpus:
        return "--precision (fp16): needs a GPU, and this machine has none; use --precision bf16 or no"
    if precision == "bf16" and not machine.has_bf16:
        return "--precision (bf16): this GPU does not compute in bf16; use --precision fp16 or no"
    return None


def _deepspeed_problem(backend: str, machine: Machine) -> str | None:
    if not machine.has_deepspeed:
        return f"--backend ({backend}): needs the package deepspeed; run `bash launch/setup.sh`, or use --backend fsdp"
    return None


def _import_file(path: Path) -> ModuleType:
    """Run a recipe's file as a module, with its folder on sys.path as it would be for a script."""
    spec = importlib.util.spec_from_file_location(f"samestep_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"recipe ({path}): must be a Python file (.py); {_recipe_fix(path)}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the recipe look themselves up there
    sys.path.insert(0, str(path.parent))
    gc.disable()  # looking for garbage takes a sixth of the time in which torch and transformers are imported
    try:
        spec.loader.exec_module(module)
    finally:
        gc.enable()
        sys.path.remove(str(path.parent))
    return module


def _recipe_fix(path: Path) -> str:
    recipes = {found.stem: found for found in sorted(RECIPE_FOLDER.glob("*.py"))}
    near = nearest_word(path.stem, recipes)
    here = Path.cwd()
    if near is None:
        return "give the path of a recipe, such as recipes/lora_sst2.py"
    found = recipes[near]
    return f"did you mean {found.relative_to(here) if found.is_relative_to(here) else found}?"


def _recipe_problems(path: Path, error: ValidationError) -> list[str]:
    """The recipe's own mistakes in DEFAULTS, by the class and field they are in."""
    problems = []
    for detail in error.errors(include_url=False):
        name = ".".join([error.title, *map(str, detail["loc"])])
        problems.append(f"recipe ({path}): {name} ({detail['input']}): {detail['msg']}; correct DEFAULTS")
    return problems
