"""`samestep checkpoint list | verify | inspect | export`: look at checkpoints without a GPU, without training code, on a login node.

Only `export` imports torch. Exit codes: 0 fine, 2 what the command was given cannot be used, 3 `verify` found damage.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trainer.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from trainer.checkpoint.resume import flat_values
from trainer.checkpoint.state import read_state
from trainer.checkpoint.store import CHECKPOINTS, KEEP_SUFFIX, STEP_NAME, describe_damage, list_checkpoints
from trainer.errors import CheckpointError
from trainer.quiet import quiet_libraries

DAMAGED = 3

checkpoint_app = typer.Typer(
    no_args_is_help=True, help="Look at checkpoints, verify and export them.", rich_markup_mode=None
)

Where = Annotated[Path, typer.Argument(metavar="PATH", help="Run directory, or one checkpoint in it.")]


@checkpoint_app.command("list")
def list_command(path: Where) -> None:
    """List the checkpoints of a run, newest first, by what their manifests say.

    Example: samestep checkpoint list runs/lora_sst2
    """
    table = Table(box=None, pad_edge=False)
    for heading in ("checkpoint", "written by", "tensors", "size", "metric", ""):
        table.add_column(heading, justify="right" if heading in ("tensors", "size", "metric") else "left")
    for folder in checkpoints_at(path):
        table.add_row(folder.name, *cells(folder))
    Console(soft_wrap=True, highlight=False).print(table)


@checkpoint_app.command()
def verify(path: Where) -> None:
    """Hash every file of a checkpoint, or of all of a run; exit code 3 where one is damaged.

    Example: samestep checkpoint verify runs/lora_sst2
    """
    num_damaged = 0
    for folder in checkpoints_at(path):
        damage = describe_damage(folder)
        print(f"{folder}: {'whole' if damage is None else f'DAMAGED: {damage}'}", flush=True)
        num_damaged += damage is not None
    if num_damaged:
        raise typer.Exit(DAMAGED)


@checkpoint_app.command()
def inspect(path: Where) -> None:
    """Print what a checkpoint, or a run's newest, holds: step, topology, settings, tensors.

    Example: samestep checkpoint inspect runs/lora_sst2
    """
    folder = checkpoints_at(path)[0]
    damage = describe_damage(folder)
    if damage is not None:
        raise CheckpointError(damage)
    manifest = read_manifest(folder)
    state = read_state(folder, manifest)
    print(f"{folder}\nstep {manifest.step}, written by {topology(manifest)}, precision {manifest.precision}")
    for title, values in (("versions", manifest.versions), ("counters", vars(state.counters))):
        print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    print(f"files: {len(manifest.files) + 1}, {size_words(manifest)}")
    print(f"settings (hash {manifest.config_hash[:16]}):")
    for name, value in flat_values(state.config).items():
        print(f"  {name} {value}")
    print("tensors:")
    for key, shape in manifest.tensors.items():
        print(f"  {key} {tuple(shape)}")


@checkpoint_app.command()
def export(
    path: Where,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where to write it; must not exist.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the model's repository, if it needs any.")
    ] = False,
) -> None:
    """Write a checkpoint as a model that plain transformers opens, or as an adapter for PEFT, from any backend's shards.

    Example: samestep checkpoint export runs/lora_sst2 --output lora_sst2_step_600
    """
    quiet_libraries()
    from trainer.checkpoint.export import export_checkpoint, find_checkpoint

    folder = find_checkpoint(path)
    export_checkpoint(folder, output, trust_remote_code=trust_remote_code)
    print(f"exported {folder} to {output}, and opened it again: all tensors are there and equal")


def checkpoints_at(path: Path) -> list[Path]:
    """One checkpoint, or all of a run directory, newest first. CheckpointError where there is none."""
    if (path / MANIFEST).exists() or (STEP_NAME.fullmatch(path.name) and path.is_dir()):
        return [path]
    found = list_checkpoints(path / CHECKPOINTS) or list_checkpoints(path)
    if not found:
        what = "does not exist" if not path.exists() else "is neither a checkpoint nor a run directory that has one"
        raise CheckpointError(f"PATH ({path}) {what}; give a run directory such as runs/lora_sst2")
    return found


def cells(folder: Path) -> tuple[str, ...]:
    """The row of one checkpoint after its name."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return ("DAMAGED", "", "", "", str(error))
    metric = "" if manifest.metric is None else f"{manifest.metric:.4f}"
    note = "kept" if folder.with_name(folder.name + KEEP_SUFFIX).exists() else ""
    return (topology(manifest), str(len(manifest.tensors)), size_words(manifest), metric, note)


def topology(manifest: Manifest) -> str:
    """`fsdp on 2`."""
    return f"{manifest.backend} on {manifest.world_size}"


def size_words(manifest: Manifest) -> str:
    """Bytes of all files, in MB."""
    return f"{sum(entry.size for entry in manifest.files.values()) / 1e6:,.1f} MB"
