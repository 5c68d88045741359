"""`samestep predict`: label and confidence of texts from the command line, a file or a pipe.

Place in the flow: launch/cli.py hands the arguments over; trainer/predict does the work. Results go to standard
output, one line a text and in order; counts and speed go to standard error. Nothing heavy is imported before the run
directory is found.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, DataError, TextError
from trainer.quiet import quiet_libraries
from trainer.run_folder import find_exported
from trainer.screen import print_plain

if TYPE_CHECKING:
    from trainer.predict.classify import Predictor, Text
    from trainer.predict.kinds import AnyPrediction

TEXTS_AT_ONCE = 4096
"""Texts read, predicted and printed before the next ones are read: a file of any size fits."""

GENERATION = ("new_tokens", "num_beams", "temperature", "seed")
READS: dict[str, tuple[str, ...]] = {
    "classification": ("precision",),
    "mlm": ("top_k",),
    "mlm_pairs": ("top_k",),
    "question_answering": ("context",),
    "clm": GENERATION,
    "seq2seq": GENERATION,
}
"""Task -> the options that it reads, beside batch_size."""


def predict_command(
    run: Path,
    texts: list[str],
    *,
    file: Path | None = None,
    batch_size: int = 32,
    as_json: bool = False,
    precision: str = "no",
) -> int:
    """Predict the texts, then the lines of `file`; `-`, or neither, is standard input. Returns the exit code.

    Raises CheckpointError where `run` has no exported model, DataError for a file or text that cannot be read.
    """
    folder = find_exported(run)
    sources = Sources(texts, file)
    quiet_libraries()
    from trainer.predict.classify import load_predictor

    return predict_with(load_predictor(folder, precision=precision), sources, batch_size=batch_size, as_json=as_json)


def predict_with(predictor: "Predictor", sources: "Sources", *, batch_size: int, as_json: bool) -> int:
    """Print what an opened model says of all texts, and how fast. Returns the exit code."""
    try:
        totals = _predict_all(predictor, sources, batch_size=batch_size, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        return 0
    if totals.num_texts == 0:
        raise DataError(f"{sources.name} has no text; give one in quotes, --file FILE with one a line, or pipe them in")
    _report(totals, sources, predictor.max_length)
    return 0


def check_options(task: str, asked: dict[str, Any], *, source: str) -> None:
    """ConfigError for options that the task does not read."""
    idle = [name for name in asked if name not in READS.get(task, ())]
    if idle:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(f"{words}: has no effect on {source}, whose task is {task}; leave it out")


class Sources:
    """Where the texts come from, and which lines were empty."""

    def __init__(self, texts: list[str], file: Path | None) -> None:
        """Checks what can be checked before a model loads."""
        self.texts, self.file = texts, file
        self.empty_lines: list[int] = []
        if file is None and not texts:
            if sys.stdin is None or sys.stdin.isatty():
                raise ConfigError(
                    "no text to predict; give one in quotes, --file FILE with one a line, or pipe them in"
                )
            self.file = Path("-")
        if any(not text.strip() for text in texts):
            raise DataError("an empty text was given on the command line; leave it out")
        if self.file is not None and str(self.file) != "-" and not self.file.is_file():
            raise DataError(f"--file ({self.file}) is not a file; give a text file with one sentence a line")

    @property
    def name(self) -> str:
        """For messages."""
        return "standard input" if str(self.file) == "-" else f"--file ({self.file})"

    def located(self, error: TextError, before: int) -> DataError:
        """The same with the line of the text; before: how many texts had come before those that it was given with."""
        number = before + error.number - len(self.texts)
        if number <= 0:
            return DataError(f"text {before + error.number} {error.words}")
        for line in self.empty_lines:
            number += line <= number
        return DataError(f"{self.name}, line {number} {error.words}")

    def lines(self) -> Iterator[str]:
        """Every text, in order; empty lines are left out and their numbers kept."""
        yield from self.texts
        if self.file is None:
            return
        handle = sys.stdin.fileno() if str(self.file) == "-" else self.file
        number = 0
        try:
            with open(handle, encoding="utf-8-sig", closefd=handle is self.file) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield line.rstrip("\r\n")
                    else:
                        self.empty_lines.append(number)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.name} is not UTF-8 after line {number} ({error.reason}); convert it, with iconv say"
            ) from None
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror}") from None


@dataclass
class Totals:
    """What the report on standard error counts."""

    num_texts: int = 0
    num_cut: int = 0
    elapsed_s: float = 0.0


def _predict_all(predictor: "Predictor", sources: Sources, *, batch_size: int, as_json: bool) -> Totals:
    totals, remaining = Totals(), sources.lines()
    while lines := list(islice(remaining, TEXTS_AT_ONCE)):
        started = time.perf_counter()
        chunk = [pair_of(line) for line in lines] if predictor.pairs else lines
        try:
            predictions = predictor.predict(chunk, batch_size)
        except TextError as error:
            raise sources.located(error, totals.num_texts) from None
        totals.elapsed_s += time.perf_counter() - started
        totals.num_texts += len(chunk)
        totals.num_cut += sum(prediction.is_cut for prediction in predictions)
        width = max(map(len, predictor.label_names))
        for text, prediction in zip(chunk, predictions, strict=True):
            print_plain(sys.stdout, json_words(text, prediction) if as_json else plain_words(text, prediction, width))
    return totals


def pair_of(line: str) -> "Text":
    """The pair of a JSON object; any other line as it is, for the predictor to refuse."""
    try:
        row = json.loads(line)
        text, pair = row["text"], row["text_pair"]
    except (ValueError, TypeError, KeyError):
        return line
    return (text, pair) if isinstance(text, str) and isinstance(pair, str) else line


def plain_words(text: "Text", prediction: "AnyPrediction", width: int) -> str:
    """What is predicted and the text in columns; a text of several lines becomes one, and so does a pair."""
    words = text if isinstance(text, str) else " | ".join(text)
    return f"{prediction.columns(width)}  {' '.join(words.split())}"


def json_words(text: "Text", prediction: "AnyPrediction") -> str:
    """One JSON object, with the probability of every label."""
    return json.dumps(json_facts(text, prediction), ensure_ascii=False)


def json_facts(text: "Text", prediction: "AnyPrediction") -> dict[str, object]:
    """What a JSON line says."""
    asked = {"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
    return {**asked, **prediction.facts(), "is_cut": prediction.is_cut}


def _report(totals: Totals, sources: Sources, max_length: int) -> None:
    speed = totals.num_texts / max(totals.elapsed_s, 1e-9)
    noun = "text" if totals.num_texts == 1 else "texts"
    lines = [f"{totals.num_texts:,} {noun} in {totals.elapsed_s:.2f} s, {speed:,.0f} a second"]
    if totals.num_cut:
        lines.append(f"{totals.num_cut:,} longer than the model's {max_length} tokens; their ends were not read")
    if sources.empty_lines:
        first = ", ".join(map(str, sources.empty_lines[:5])) + (", ..." if len(sources.empty_lines) > 5 else "")
        lines.append(f"{len(sources.empty_lines):,} empty lines of {sources.name} were left out: {first}")
    print("\n".join(lines), file=sys.stderr)
