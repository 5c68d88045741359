"""`samestep data show RECIPE K --objective NAME --plot FILE`: what the model will see of a sample, in colours and as a picture.

The four-panel figure shows next tokens, masked tokens, permuted order and denoising on the first tokens of the sample.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainer.config import RunConfig, StreamData
from trainer.config.data import TASK_OF_OBJECTIVE
from trainer.data.objectives import OBJECTIVES, Rows, Vocabulary, build_objective
from trainer.data.objectives.marks import Mark, line, marks_of, ranks
from trainer.data.objectives.pictures import Panel, plot_panels, plot_text
from trainer.data.stream.open import Streams
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = {
    "plain": "",
    "masked": "black on bright_red",
    "replaced": "black on yellow",
    "kept": "black on green",
    "gap": "black on magenta",
    "target": "black on bright_blue",
    "special": "dim",
}
PANEL_TOKENS = 12
"""Of the four-panel figure."""
EVERY_ROLE = ("start", "end", "mask", "sentinels")


def with_objective(config: RunConfig, name: str) -> RunConfig:
    """The same run with another objective, as far as looking at its samples goes. ConfigError for an unknown name."""
    if name not in TASK_OF_OBJECTIVE:
        raise ConfigError(f"--objective ({name}): must be one of {', '.join(TASK_OF_OBJECTIVE)}")
    assert isinstance(config.data, StreamData)
    data = config.data.model_copy(update={"objective": name, "isolate": config.data.isolate and name == "clm"})
    model = config.model.model_copy(update={"task": TASK_OF_OBJECTIVE[name]})
    return config.model_copy(update={"data": data, "model": model})


def show_marked(config: RunConfig, streams: Streams, sample: int, plot: Path | None) -> None:
    """Print the marked text of a sample; with `plot` draw it."""
    parts, _ = marked(config, streams, sample)
    print_marks(parts)
    if plot is not None:
        assert isinstance(config.data, StreamData)
        plot_text(parts, f"{config.name}, sample {sample:,}: {config.data.objective}", plot)
        print(f"wrote {plot}")


def marked(config: RunConfig, streams: Streams, sample: int) -> tuple[dict[str, list[Mark]], dict[str, Any]]:
    """Title -> marked tokens, and the batch of this one sample as arrays."""
    from trainer.task.objective import ObjectiveTask

    data = config.data
    assert isinstance(data, StreamData)
    if data.objective == "clm":
        tokenizer, vocabulary = completed(config, streams)
        batch: dict[str, Any] = streams.train.batch([sample])
        batch["attention_mask"] = np.arange(batch["input_ids"].shape[1]) < batch["num_tokens"][:, None]
    else:
        task = ObjectiveTask(config, streams)
        tokenizer, vocabulary = task.tokenizer, task.vocabulary
        batch = {name: tensor.numpy() for name, tensor in task.training_batch(np.array([sample])).items()}
    parts = marks_of(data.objective, batch, 0, vocabulary, token_text(tokenizer))
    if "pair_labels" in batch:
        answers = (
            "they belong together",
            "the second is from elsewhere" if data.objective == "mlm_nsp" else "they were swapped",
        )
        parts = {
            f"{title}; of the two texts: {answers[int(batch['pair_labels'][0])]}": marks
            for title, marks in parts.items()
        }
    return parts, batch


def completed(config: RunConfig, streams: Streams) -> "tuple[PreTrainedTokenizerBase, Vocabulary]":
    """The data's tokenizer with every special token that an objective needs."""
    from transformers import PreTrainedTokenizerFast

    from trainer.data.objectives.vocabulary import complete, vocabulary_of

    tokenizer = cast(Any, PreTrainedTokenizerFast)(tokenizer_file=str(streams.tokenizer_file))
    complete(tokenizer, EVERY_ROLE)
    eos, source = streams.train.tokenizer.eos, config.model.source
    return tokenizer, vocabulary_of(tokenizer, EVERY_ROLE, objective="", source=source, separator=eos)


def token_text(tokenizer: "PreTrainedTokenizerBase") -> Callable[[int], str]:
    """The text of a token with the space before it, where one belongs there."""
    from trainer.data.objectives.vocabulary import is_word_piece

    by_words = is_word_piece(tokenizer)

    def text(token: int) -> str:
        name = str(tokenizer.convert_ids_to_tokens(token))
        if token in tokenizer.all_special_ids:
            return f" {name}" if by_words else name
        if by_words:
            return name.removeprefix("##") if name.startswith("##") else f" {name}"
        return str(tokenizer.decode([token]))

    return text


def print_marks(parts: dict[str, list[Mark]]) -> None:
    """In colours on a terminal; elsewhere with brackets around what is to be found."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    is_terminal = sys.stdout.isatty()
    for title, marks in parts.items():
        print(f"--- {title}")
        if is_terminal:
            console.print(Text.assemble(*((mark.words, STYLES[mark.kind]) for mark in marks)))
        else:
            print(line(marks))


def show_four(config: RunConfig, streams: Streams, sample: int, plot: Path) -> None:
    """Draw the four-panel figure from the first tokens of a sample."""
    tokenizer, vocabulary = completed(config, streams)
    read = streams.train.batch([sample])
    ids = np.array([read["input_ids"][0][:PANEL_TOKENS]])
    rows = Rows(ids, np.array([ids.shape[1]]), np.array([sample]))
    text = token_text(tokenizer)
    panels = [next_tokens(ids[0], text), masks(config, rows, vocabulary, text), order(config, rows, vocabulary, text)]
    plot_panels(
        [*panels, denoising(config, rows, vocabulary, text)],
        f"Four objectives on sample {sample:,} of {config.name}",
        plot,
    )
    print(f"wrote {plot}")


def short(config: RunConfig, objective: str, length: int, fraction: float) -> StreamData:
    """Settings of an objective on a few tokens, of which enough are to be found."""
    assert isinstance(config.data, StreamData)
    update = {
        "objective": objective,
        "sequence_length": length,
        "noise_fraction": fraction,
        "mean_span": 2.0,
        "isolate": False,
    }
    return config.data.model_copy(update=update)


def next_tokens(ids: Any, text: Callable[[int], str]) -> Panel:
    """clm."""
    given = [Mark(text(int(token)), "plain") for token in ids[:-1]]
    found = [text(int(token)) for token in ids[1:]]
    return Panel("clm", "the next token, from all before it", given, found, np.tri(len(found), dtype=np.bool_))


def masks(config: RunConfig, rows: Rows, vocabulary: Vocabulary, text: Callable[[int], str]) -> Panel:
    """mlm."""
    objective = build_objective(short(config, "mlm", PANEL_TOKENS + 2, 0.3), vocabulary, 0)
    batch = seeded(objective, rows, lambda found: int((found["labels"] >= 0).sum()) >= 3)
    given = marks_of("mlm", batch, 0, vocabulary, text)["given"]
    found = [mark.wanted for mark in given if mark.kind in ("masked", "replaced", "kept")]
    return Panel(
        "mlm", "the tokens behind masks, from both sides", given, found, np.ones((len(found), len(given)), np.bool_)
    )


def order(config: RunConfig, rows: Rows, vocabulary: Vocabulary, text: Callable[[int], str]) -> Panel:
    """plm."""
    objective = build_objective(short(config, "plm", PANEL_TOKENS + 2, 1 / 3), vocabulary, 0)
    batch = seeded(objective, rows, lambda found: int((found["order"] >= 0).sum()) >= 4)
    (given,) = marks_of("plm", batch, 0, vocabulary, text).values()
    places = np.array(ranks(batch["order"][0]))
    targets = np.argsort(np.where(places < 0, len(places), places))[: int((places >= 0).sum())]
    sees = (places[None, :] < places[targets][:, None]) | (places < 0)[None, :]
    numbered = [replace(mark, text=f"{mark.place}: {mark.text}" if mark.place >= 0 else mark.text) for mark in given]
    found = [f"{place}: {given[target].text}" for place, target in enumerate(targets)]
    return Panel("plm", "tokens in a random order, from the text and those before them in it", numbered, found, sees)


def denoising(config: RunConfig, rows: Rows, vocabulary: Vocabulary, text: Callable[[int], str]) -> Panel:
    """span_corruption: the encoder's whole input, and the targets before each."""
    objective = build_objective(short(config, "span_corruption", PANEL_TOKENS + 2, 0.3), vocabulary, 0)
    sides = marks_of("span_corruption", objective.batch(rows), 0, vocabulary, text)
    given, wanted = sides["given"], sides["to be found"]
    before = [replace(mark, text=f"({mark.text.strip() or mark.text})") for mark in wanted[:-1]]
    sees = np.hstack(
        [np.ones((len(wanted), len(given)), np.bool_), np.tri(len(wanted), len(before), -1, dtype=np.bool_)]
    )
    words = f"{OBJECTIVES['span_corruption'].words}; (in brackets) what was found so far"
    return Panel("span_corruption", words, [*given, *before], [mark.text for mark in wanted], sees)


def seeded(objective: Any, rows: Rows, is_enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A batch with enough to be found, by the first seed that gives it: a few tokens may hold nothing."""
    return next(
        batch for batch in (replace(objective, seed=seed).batch(rows) for seed in range(1000)) if is_enough(batch)
    )
