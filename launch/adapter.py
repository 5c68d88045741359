"""`samestep adapter list | inspect | merge | compare | evaluate`: exported adapters, alone and side by side.

Exit codes: 0 fine, 1 the merged model is another model (compare), 2 a mistake in the command.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launch.predict_adapters import named_runs
from trainer.errors import CheckpointError, ConfigError, SamestepError
from trainer.quiet import quiet_libraries
from trainer.run_folder import ADAPTER_FILE, MODEL_FOLDER

if TYPE_CHECKING:
    from trainer.model.adapters import Difference

adapter_app = typer.Typer(no_args_is_help=True, help="Look at adapters, merge and compare them.", rich_markup_mode=None)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the model folder in it.")]
Into = Annotated[
    str | None,
    typer.Option(help="base, or dequantized: a quantized base as the adapter knew it, the default where there is one."),
]
EVALUATED_AT_ONCE = 512
"""Samples that all adapters answer before the next ones are looked at."""
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code shipped with the base model.")]


@adapter_app.command("list")
def list_command(
    runs: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of runs.")] = Path("runs"),
) -> None:
    """List the runs of a folder that exported an adapter.

    Example: samestep adapter list runs
    """
    quiet_libraries()
    from trainer.model.adapters import adapter_facts, find_adapter
    from trainer.model.bottleneck import SETTINGS_FILE

    if not runs.is_dir():
        raise CheckpointError(f"FOLDER ({runs}) is no folder; give the one that holds your runs")
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "method", "parameters", "size", "step", "base"):
        table.add_column(heading, justify="right" if heading in ("parameters", "size", "step") else "left")
    damaged = []
    files = [file for name in (ADAPTER_FILE, SETTINGS_FILE) for file in runs.glob(f"*/{MODEL_FOLDER}/{name}")]
    for run in sorted(file.parent.parent for file in files):
        try:
            facts = adapter_facts(*find_adapter(run))
        except SamestepError as error:
            damaged.append(f"{run.name}: left out: {error}")
            continue
        size = f"{facts['num_bytes'] / 1e6:,.2f} MB"
        table.add_row(
            run.name, facts["method"], f"{facts['num_parameters']:,}", size, str(facts["step"]), facts["base"]
        )
    if not files:
        raise CheckpointError(f"FOLDER ({runs}) holds no run that exported an adapter; give another folder")
    Console(soft_wrap=True, highlight=False).print(table)
    for words in damaged:
        print(words, file=sys.stderr)


@adapter_app.command()
def inspect(run: Run) -> None:
    """Print what an exported adapter is: base, settings, tensors.

    Example: samestep adapter inspect runs/lora_sst2
    """
    quiet_libraries()
    from trainer.model.adapters import adapter_facts, find_adapter

    folder, info = find_adapter(run)
    facts = adapter_facts(folder, info)
    quantized = f", quantized to {facts['quantization']['quantize']}" if facts["quantization"] else ""
    print(f"{folder}\nmethod {facts['method']} of step {facts['step']}, on {facts['base']}{quantized}")
    print(f"{facts['num_parameters']:,} parameters, {facts['num_bytes'] / 1e6:,.2f} MB")
    for name, value in facts["settings"].items():
        if value not in (None, False, [], {}, ""):
            print(f"  {name}: {value}")
    print("tensors:")
    for name, size in facts["tensors"].items():
        print(f"  {name} {size:,}")


@adapter_app.command()
def merge(
    run: Run,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="Must not exist; RUN/merged if left out.")
    ] = None,
    into: Into = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write base and adapter as one model that plain transformers opens; it is opened again and compared.

    Example: samestep adapter merge runs/lora_sst2
    """
    quiet_libraries()
    from trainer.model.adapters import find_adapter
    from trainer.model.adapters import merge as merge_adapter

    folder, info = find_adapter(run)
    chosen = choose_into(into, info)
    target = output if output is not None else run / "merged"
    merge_adapter(folder, info, chosen, target, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    print(f"merged {folder} into its {'base' if chosen == 'base' else 'dequantized base'}: {target}, opened again")
    if info.get("quantization"):
        print(f"see what it changed: samestep adapter compare {run}")


@adapter_app.command()
def compare(
    run: Run,
    *,
    text: Annotated[Path | None, typer.Option(help="File with one text a line; else real text of an asset.")] = None,
    num_texts: Annotated[int, typer.Option(min=1, help="How many texts.")] = 32,
    trust_remote_code: Trust = False,
) -> None:
    """Compare the adapter on its base with the merged model, on real text; exit code 1 where that is another model.

    Example: samestep adapter compare runs/lora_sst2 --num-texts 100
    """
    quiet_libraries()
    from trainer.model.adapters import COMPARED, find_adapter, merged
    from trainer.model.adapters import compare as compare_models
    from trainer.model.export import load_exported

    folder, info = find_adapter(run)
    task = str(info.get("task", "classification"))
    if task not in COMPARED:
        raise ConfigError(
            f"RUN ({run}) is of task {task}, and compare takes one distribution a text or a token, of {', '.join(COMPARED)}; "
            "merge it, and compare the metrics of your own data"
        )
    texts = read_texts(text, task, num_texts)
    model, tokenizer, _ = load_exported(folder, trust_remote_code=trust_remote_code)
    rows = {}
    for into in ("dequantized", "base") if info.get("quantization") else ("base",):
        other = merged(folder, info, into, trust_remote_code=trust_remote_code)
        rows[into] = compare_models(model, other, tokenizer, texts)
    show(rows, len(texts))
    if rows[choose_into(None, info)].verdict.startswith("ANOTHER"):
        raise typer.Exit(1)


@adapter_app.command()
def evaluate(
    runs: Annotated[str, typer.Argument(metavar="RUN,RUN,...", help="Runs that exported adapters of one base.")],
) -> None:
    """Test several adapters in one pass over the test split of the first run's data; the base is loaded once.

    Example: samestep adapter evaluate runs/lora_sst2,runs/dora_sst2
    """
    quiet_libraries()
    from trainer.predict.adapters import AdapterPredictor
    from trainer.predict.kinds import Prediction

    paths = named_runs([run for run in runs.split(",") if run], "RUN,RUN")
    texts, labels = held_out_samples(next(iter(paths.values())))
    predictor, correct = AdapterPredictor(paths), dict.fromkeys(paths, 0)
    for name, one in predictor.predictors.items():
        refuse_other_targets(name, one.target)
        unknown = sorted(set(labels) - set(one.label_names))
        if unknown:
            raise ConfigError(
                f"RUN ({name}) answers with {', '.join(one.label_names)}, and the first run's data has the label {unknown[0]}, "
                "which it cannot say; give adapters that were trained on these labels"
            )
    for start in range(0, len(texts), EVALUATED_AT_ONCE):
        samples = list(zip(texts, labels, strict=True))[start : start + EVALUATED_AT_ONCE]
        answers = iter(predictor.predict([(text, name) for text, _ in samples for name in paths]))
        for _, label in samples:
            for name in paths:
                answer = next(answers)
                correct[name] += isinstance(answer, Prediction) and answer.label == label
    table = Table(box=None, pad_edge=False)
    for heading in ("adapter", "accuracy", "examples"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    for name in paths:
        table.add_row(name, f"{correct[name] / len(labels):.4f}", f"{len(labels):,}")
    Console(soft_wrap=True, highlight=False).print(table)


def held_out_samples(run: Path) -> tuple[list[Any], list[str]]:
    """(texts, labels) of the test split, or without one the validation split, that a run's settings name."""
    from trainer.config import ClassificationData
    from trainer.data.classify import read_splits
    from trainer.resolve.build import load_config

    config = load_config(run / "config.yaml")
    if not isinstance(config.data, ClassificationData):
        raise ConfigError(f"RUN ({run}) was not trained on labelled texts; evaluate works for classification")
    refuse_other_targets(run, config.data.target)
    splits = read_splits(config.data)
    samples = splits.test or splits.validation
    texts = list(samples.texts) if samples.pairs is None else list(zip(samples.texts, samples.pairs, strict=True))
    return texts, [splits.label_names[label] for label in samples.labels]


def refuse_other_targets(run: Path | str, target: str) -> None:
    """ConfigError unless a run gives each text one label."""
    if target != "single":
        raise ConfigError(
            f"RUN ({run}) was trained with data.target={target}; evaluate counts right labels, of which a text must have one"
        )


def choose_into(into: str | None, info: dict[str, Any]) -> str:
    """What to merge into: as asked, or what keeps the model that was trained."""
    if into not in (None, "base", "dequantized"):
        raise ConfigError(f"--into ({into}): must be base or dequantized; leave it out for the one that was trained on")
    return into or ("dequantized" if info.get("quantization") else "base")


def read_texts(file: Path | None, task: str, count: int) -> list[str]:
    """The first texts of a file; or sentences of asset:sst, or docstrings with their functions. ConfigError for a file without text."""
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--text ({file}) cannot be read ({error}); give a UTF-8 file with one text a line"
            ) from None
        texts = [line for line in lines if line][:count]
        if not texts:
            raise ConfigError(f"--text ({file}) holds no text; give a UTF-8 file with one text a line")
        return texts
    from trainer.data.tables import read_file

    if task == "classification":
        from trainer.data.assets import asset_path

        table = read_file(asset_path("sst") / "sst.tsv", {"text": "text"})
        return [str(value) for value in table.columns["text"][:count]]
    from trainer.data.docstrings import docstring_file

    table = read_file(docstring_file(), {"prompt": "prompt", "response": "response"})
    pairs = zip(table.columns["prompt"][:count], table.columns["response"][:count], strict=True)
    return [f"{prompt}\n\n{response}" for prompt, response in pairs]


def show(rows: "dict[str, Difference]", num_texts: int) -> None:
    """One row for each way to merge, and what follows from it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("merged into", "outputs", "mean KL", "top-1 equal", "largest logit gap"):
        table.add_column(heading, justify="left" if heading == "merged into" else "right")
    for into, row in rows.items():
        numbers = (f"{row.num_positions:,}", f"{row.mean_kl:.2e}", f"{row.top1_agreement:.2%}")
        table.add_row(into, *numbers, f"{row.max_logit_difference:.2e}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"the adapter on its base against the merged model, on {num_texts} texts (KL in nats)")
    console.print(table)
    for into, row in rows.items():
        console.print(f"merged into {into}: {row.verdict}")
