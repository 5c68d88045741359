"""`samestep predict --adapters A,B`: several adapters on one base. Each answers every text, or the one that a request names.

Results go to standard output, one line an answer; counts and speed go to standard error. No torch at module level.
"""

import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from launch.predict import TEXTS_AT_ONCE, Sources, check_options, json_facts, plain_words
from trainer.errors import ConfigError, DataError, TextError
from trainer.quiet import quiet_libraries
from trainer.screen import print_plain

if TYPE_CHECKING:
    from trainer.predict.adapters import AdapterGenerator, AdapterPredictor
    from trainer.predict.classify import Text

Request = tuple["Text", str]
"""A text or pair, and the name of the adapter that answers it."""


def named_runs(runs: Sequence[str], setting: str = "--adapters") -> dict[str, Path]:
    """Folder's name -> run. ConfigError where two runs have one name, or there is none."""
    names = {Path(run).name: Path(run) for run in runs}
    if not runs or len(names) < len(runs):
        raise ConfigError(f"{setting} ({','.join(runs)}): must be runs with different names, separated by commas")
    return names


def refuse_beside_adapters(given: dict[str, Any]) -> None:
    """ConfigError for options that were given, and that only a single run reads."""
    idle = [name for name, value in given.items() if value]
    if idle:
        raise ConfigError(f"{', '.join(idle)}: has no effect with --adapters, whose runs say their task; leave it out")


def predict_adapters_command(
    runs: str, first_text: str | None, texts: list[str], options: dict[str, Any], *, file: Path | None, as_json: bool
) -> int:
    """Answer all texts, or the requests of a `.jsonl` file. Returns the exit code.

    runs: separated by commas. first_text: what stands where else a run does. options: those of PredictOptions that were given.
    ConfigError for runs that do not go together, or an option without effect.
    """
    names = named_runs([word.strip() for word in runs.split(",") if word.strip()])
    sources = Sources([first_text, *texts] if first_text is not None else texts, file)
    quiet_libraries()
    from trainer.predict.adapters import AdapterGenerator, AdapterPredictor
    from trainer.predict.answer import PredictOptions
    from trainer.predict.source import task_of_adapter

    task = task_of_adapter(next(iter(names.values())))
    asked = {name: value for name, value in options.items() if name != "batch_size"}
    check_options(task, asked, source=runs)
    chosen = PredictOptions(**options)
    began = time.perf_counter()
    model: AdapterPredictor | AdapterGenerator = (
        AdapterGenerator(names, chosen) if task == "clm" else AdapterPredictor(names)
    )
    count, remaining = 0, requests_of(sources, list(names))
    while chunk := list(islice(remaining, TEXTS_AT_ONCE)):
        try:
            lines = list(answers_of(model, chunk, chosen.batch_size, as_json=as_json))
        except TextError as error:
            raise sources.located(
                TextError(text_number(sources, names, count + error.number), error.words), 0
            ) from None
        count += len(chunk)
        for (_, name), line in zip(chunk, lines, strict=True):
            print_plain(sys.stdout, line if as_json else f"{name:<{max(map(len, names))}}  {line}")
    if count == 0:
        raise DataError(f"{sources.name} has no text; give one in quotes, --file FILE with one a line, or pipe them in")
    how = "in mixed batches" if getattr(model, "mixes", False) else "one adapter after the other"
    elapsed_s = time.perf_counter() - began
    print(f"{count:,} answers of {len(names)} adapters, {how}, in {elapsed_s:.2f} s", file=sys.stderr)
    return 0


def answers_of(
    model: "AdapterPredictor | AdapterGenerator", requests: Sequence[Request], batch_size: int, *, as_json: bool
) -> Iterator[str]:
    """What is printed of each request."""
    from trainer.predict.adapters import AdapterPredictor

    if not isinstance(model, AdapterPredictor):
        texts = cast("Sequence[tuple[str, str]]", requests)  # it refuses a pair
        for (_, name), written in zip(requests, model.answer(texts), strict=True):
            yield json.dumps({"adapter": name, **written.facts}, ensure_ascii=False) if as_json else written.words
        return
    width = max(len(label) for predictor in model.predictors.values() for label in predictor.label_names)
    for (text, name), answer in zip(requests, model.predict(requests, batch_size), strict=True):
        facts = {"adapter": name, **json_facts(text, answer)}
        yield json.dumps(facts, ensure_ascii=False) if as_json else plain_words(text, answer, width)


def requests_of(sources: Sources, names: Sequence[str]) -> Iterator[Request]:
    """Every text for every adapter; of a `.jsonl` file for the adapter that its line names."""
    for number, line in enumerate(sources.lines(), start=1):
        if holds_requests(sources) and number > len(sources.texts):
            yield request_of(line, names, f"{sources.name}, request {number - len(sources.texts)}")
        else:
            yield from ((line, name) for name in names)


def holds_requests(sources: Sources) -> bool:
    """Whether the lines of the file say which adapter is asked."""
    return sources.file is not None and sources.file.suffix == ".jsonl"


def text_number(sources: Sources, names: Collection[str], request: int) -> int:
    """Which of the texts a request holds, both from 1."""
    by_all = len(sources.texts) * len(names)
    if holds_requests(sources) and request > by_all:
        return len(sources.texts) + request - by_all
    return (request - 1) // len(names) + 1


def request_of(line: str, names: Sequence[str], where: str) -> Request:
    """DataError for a line that is no {"text": ..., "adapter": ...}, with "text_pair" for a pair."""
    try:
        row = json.loads(line)
        text, pair, name = row["text"], row.get("text_pair", ""), row["adapter"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f'{where} ({line:.80}): must be {{"text": ..., "adapter": ...}}') from None
    if name not in names:
        raise DataError(f"{where}: adapter ({name}) must be one of {', '.join(names)}")
    for key, value in (("text", text), ("text_pair", pair)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {key} ({value!r:.80}) must be a string")
    return (text, pair) if "text_pair" in row else text, name
