"""`samestep predict`: which model, which task, and the answers of every task but classes, whose output is launch/predict.py's.

Results go to standard output, one line a text and in order; counts and speed go to standard error. No torch at module level.
"""

import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from launch.predict import TEXTS_AT_ONCE, Sources, check_options, predict_command, predict_with
from launch.predict_adapters import predict_adapters_command, refuse_beside_adapters
from launch.predict_chat import open_chat
from trainer.errors import ConfigError, DataError, TextError
from trainer.predict.answer import OPENERS, Answerer, PredictOptions
from trainer.quiet import quiet_libraries
from trainer.run_folder import find_exported
from trainer.screen import print_plain


def predict(
    run_folder: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Run directory, or with --task a model source; none with --adapters."),
    ] = None,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts.")] = None,
    *,
    adapters: Annotated[
        str | None,
        typer.Option(help="Runs on one base, by commas: all answer each text, or one each line of a .jsonl."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="What a model source is to do, such as mlm or clm.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with one text a line; - is standard input.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Answer each text, with a run on conversations.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one batch.")] = 32,
    context: Annotated[Path | None, typer.Option(help="File with the text that questions are answered from.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Candidates for each mask.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a generated text.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Above 1: beam search.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Sample; without it the likeliest text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of classes: no (fp32), or bf16, which is faster.")] = None,
) -> None:
    """Answer each text by the model's task: class, tokens behind masks, entities, answer, text.

    Example: samestep predict runs/lora_sst2 "a gripping film" "dull from start to end"
    """
    given = list(texts or ())
    options: dict[str, Any] = {"top_k": top_k, "new_tokens": new_tokens, "num_beams": num_beams}
    options |= {"temperature": temperature, "seed": seed, "precision": precision}
    if precision not in (None, "no", "bf16"):
        raise ConfigError(f"--precision ({precision}): must be no or bf16")
    asked = {name: value for name, value in options.items() if value is not None}
    if adapters is not None:
        refuse_beside_adapters({"--task": task, "--chat": chat, "--context": context, "--precision": precision})
        asked["batch_size"] = batch_size
        raise typer.Exit(predict_adapters_command(adapters, run_folder, given, asked, file=file, as_json=as_json))
    if run_folder is None:
        raise ConfigError("no run to predict with; give a run directory such as runs/lora_sst2, or --adapters A,B,C")
    if context is not None:
        asked["context"] = read_context(context)
    if chat and task is not None:
        raise ConfigError("--chat asks a run on conversations, and --task says what a model source does; leave one out")
    found = "clm" if chat else task or task_of_run(run_folder)
    check_options(found, asked, source=run_folder)
    if found == "classification":
        how: dict[str, Any] = {"batch_size": batch_size, "precision": precision or "no", "is_source": task is not None}
        raise typer.Exit(classes(run_folder, given, file=file, as_json=as_json, **how))
    chosen = PredictOptions(batch_size=batch_size, **asked)
    kind: Literal["run", "source", "chat"] = "source" if task is not None else "chat" if chat else "run"
    raise typer.Exit(predict_tasks(run_folder, found, given, chosen, file=file, as_json=as_json, kind=kind))


def task_of_run(run_folder: str) -> str:
    """The task of a run. CheckpointError for what is none, ConfigError for a model source without --task."""
    if run_folder.startswith("asset:"):
        raise ConfigError(f"RUN ({run_folder}) is a model source; say what it is to do: --task mlm, say")
    folder = find_exported(Path(run_folder), None)
    from trainer.predict.source import task_of

    return task_of(folder)


def read_context(file: Path) -> str:
    """The text of --context."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--context ({file}): cannot be read ({error}); give a text file in UTF-8") from None


def classes(
    source: str,
    texts: list[str],
    *,
    file: Path | None,
    as_json: bool,
    batch_size: int,
    precision: str,
    is_source: bool,
) -> int:
    """Labels and confidences, or numbers, of a run or of a model source."""
    if not is_source:
        path = Path(source)
        return predict_command(path, texts, file=file, batch_size=batch_size, as_json=as_json, precision=precision)
    sources = Sources(texts, file)
    quiet_libraries()
    from trainer.predict.classify import in_precision, predictor_of
    from trainer.predict.source import open_source

    model, tokenizer, info = open_source(source, "classification")
    predictor = predictor_of(in_precision(model, precision, info), tokenizer, info)
    return predict_with(predictor, sources, batch_size=batch_size, as_json=as_json)


def predict_tasks(
    source: str,
    task: str,
    texts: list[str],
    options: PredictOptions,
    *,
    file: Path | None,
    as_json: bool,
    kind: Literal["run", "source", "chat"],
) -> int:
    """Answers of any other task, by a run, a model source, or a run that is asked in its chat template. Returns the exit code."""
    if task not in OPENERS:
        raise ConfigError(f"--task ({task}): predict answers for classification, {', '.join(OPENERS)}")
    sources = Sources(texts, file)
    quiet_libraries()
    answerer = open_chat(Path(source), options) if kind == "chat" else open_task(source, task, options, kind)
    try:
        count, elapsed_s = answer_all(answerer, sources, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        return 0
    if not count:
        raise DataError(f"{sources.name} has no text; give one in quotes, --file FILE with one a line, or pipe them in")
    noun = "text" if count == 1 else "texts"
    print(f"{count:,} {noun} in {elapsed_s:.2f} s, {count / max(elapsed_s, 1e-9):,.1f} a second", file=sys.stderr)
    return 0


def open_task(source: str, task: str, options: PredictOptions, kind: str) -> Answerer:
    """What answers a task, by a run or a model source."""
    from trainer.predict.answer import open_answerer
    from trainer.predict.source import open_run, open_source

    return open_answerer(task, *(open_source(source, task) if kind == "source" else open_run(Path(source))), options)


def answer_all(answerer: Answerer, sources: Sources, *, as_json: bool) -> tuple[int, float]:
    """Print every answer; how many there were, and the seconds that they took."""
    count, elapsed_s, remaining = 0, 0.0, iter(sources.lines())
    while chunk := list(islice(remaining, TEXTS_AT_ONCE)):
        began = time.perf_counter()
        try:
            answers = answerer.answer(chunk)
        except TextError as error:
            raise sources.located(error, count) from None
        elapsed_s += time.perf_counter() - began
        count += len(answers)
        for answer in answers:
            print_plain(sys.stdout, json.dumps(answer.facts, ensure_ascii=False) if as_json else answer.words)
    return count, elapsed_s
