"""The command `samestep`. Each command is a few lines; the work is in command.py, preflight.py, parity.py, predict.py.

No torch at module level: `samestep --help` is quick and works on a login node.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launch.adapter import adapter_app
from launch.checkpoint import checkpoint_app
from launch.command import RunOptions, backend_names, display_line, launch_command, launch_environment
from launch.inspect import inspect
from launch.job import job_app
from launch.parity_plan import plan_parity, words_of
from launch.predict_tasks import predict
from launch.queue import logs, status
from launch.submit import cancel, submit
from launch.template import template_app
from launch.vocabulary import data_app
from trainer.errors import ConfigError, SamestepError
from trainer.resolve import end_quickly, error_text, json_schema

SCHEMA_FILE = Path(__file__).resolve().parent.parent / "recipes" / "configs" / "schema.json"

app = typer.Typer(
    name="samestep",
    help="One recipe. Any backend. The same step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(no_args_is_help=True, help="Tools for settings files.", rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(data_app, name="data")
app.add_typer(adapter_app, name="adapter")
app.add_typer(template_app, name="template")
app.add_typer(job_app, name="job", hidden=True)
for command in (predict, inspect, submit, status, cancel, logs):
    app.command()(command)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's file, such as recipes/lora_sst2.py.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe.")]
ConfigFiles = Annotated[list[Path] | None, typer.Option("--config", help="YAML file of settings; may be repeated.")]
Precision = Annotated[str, typer.Option(help="no (fp32), bf16 or fp16 (GPU only).")]


def main(argv: Sequence[str] | None = None) -> None:
    """The console entry point: runs one command and exits, with 2 and no traceback for a user's mistake."""
    end_quickly()
    try:
        app(args=None if argv is None else list(argv), prog_name="samestep")
    except SamestepError as error:
        print(error_text(error), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:  # a path is the user's to correct, a torn connection is not
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    backend: Annotated[str | None, typer.Option(help=f"{', '.join(backend_names())}.")] = None,
    processes: Annotated[int | None, typer.Option(help="Ranks on this machine.")] = None,
    precision: Precision = "no",
    config: ConfigFiles = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the line, start nothing.")
    ] = False,
) -> None:
    """Check everything, print the exact `accelerate launch` line, and run it.

    Example: samestep run recipes/lora_sst2.py --backend fsdp --processes 2 optim.peak_lr=5e-4
    """
    options = RunOptions(recipe, backend, processes, precision, tuple(config or ()), tuple(overrides or ()))
    from launch.preflight import check_run

    check_run(options)
    print(display_line(options), flush=True)
    if not dry_run:
        command = launch_command(options)
        # exec: signals and the exit code are the launcher's own, and the memory of the checks is given back.
        os.execve(command[0], command, os.environ | launch_environment(options))


@app.command()
def parity(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    backends: Annotated[
        str, typer.Option(help="Which backends, separated by commas.")
    ] = "single,ddp,fsdp,zero1,zero2,zero3",
    processes: Annotated[str, typer.Option(help="Numbers of ranks, separated by commas.")] = "2",
    split: Annotated[
        str, typer.Option(help="MICRO-BATCHxACCUMULATION of a rank, separated by commas, such as 4x4,16x1.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Optimizer steps to compare.", min=1)] = 5,
    precision: Precision = "no",
    config: ConfigFiles = None,
) -> None:
    """Run some steps on several backends from the same weights and samples; exit code 1 where they differ.

    Example: samestep parity recipes/lora_sst2.py --backends single,ddp,zero3 --processes 1,2
    """
    variants = plan_parity(backends, processes, split, precision)
    options = RunOptions(recipe, precision=precision, configs=tuple(config or ()), overrides=tuple(overrides or ()))
    from launch.parity import parity_command
    from launch.preflight import check_parity

    check_parity(options, variants)
    raise typer.Exit(parity_command(options, variants, steps=steps))


@app.command()
def methods(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="asset:NAME, a model's folder or a hub id.")],
    *,
    task: Annotated[
        str, typer.Option(help="classification or clm: what the model's head predicts.")
    ] = "classification",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of lora, dora, rslora and qlora.")] = None,
    targets: Annotated[str | None, typer.Option(help="Their layers, separated by commas.")] = None,
    chart: Annotated[Path, typer.Option(help="Where to write the bar chart.")] = Path("methods.png"),
    measure: Annotated[bool, typer.Option("--measure", help="Train each on asset:sst too; takes minutes.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each training with --measure.")] = 200,
) -> None:
    """Print what each method trains on a model: parameters, file size, memory; and draw it.

    Example: samestep methods asset:minilm --rank 16
    """
    if task not in ("classification", "clm"):
        raise ConfigError(f"--task ({task}): must be classification or clm")
    if measure and task != "classification":
        raise ConfigError("--measure: trains on sentences with labels; leave out --task clm")
    from launch.methods import methods_command

    layers = tuple(words_of(targets)) if targets is not None else None
    if layers == ():
        raise ConfigError(f"--targets ({targets}): names no layer; give some, separated by commas, or leave it out")
    chosen = steps if measure else None
    raise typer.Exit(methods_command(model, task=task, rank=rank, targets=layers, chart=chart, measure_steps=chosen))


@config_app.command()
def schema(
    out: Annotated[Path, typer.Option(help="Where to write it; - prints it.")] = SCHEMA_FILE,
) -> None:
    """Write the JSON schema of --config files, by which editors complete and check them.

    Example: samestep config schema --out -
    """
    text = json.dumps(json_schema(), indent=2) + "\n"
    if str(out) == "-":
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out ({out}): cannot be written: {error.strerror}; give another path") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
