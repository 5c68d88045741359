"""`samestep template preview`: samples as training sees them, targets in colour, with the gate's verdict. Trains nothing."""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from trainer.errors import ConfigError, DataError
from trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config import InstructData
    from trainer.data.instruct import Sample

template_app = typer.Typer(no_args_is_help=True, help="Look at instruction data.", rich_markup_mode=None)
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.6 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1em; border-radius: 6px }}
mark {{ background: #b7ebc6; color: inherit }}
.ids {{ font-size: 12px; color: #555 }}
.bad {{ color: #a40000 }}
</style>
<h1>{title}</h1>
<p>{facts}</p>
{findings}
{samples}
"""


@template_app.callback()
def group() -> None:
    """Look at instruction data."""


@template_app.command()
def preview(
    source: Annotated[str, typer.Argument(metavar="DATA", help="A file, a hub dataset, or asset:stdlib.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as max_length=256.")
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template.")] = "asset:smollm2",
    count: Annotated[int, typer.Option("-n", min=1, help="Samples to show.")] = 3,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page instead.")] = None,
) -> None:
    """Show samples with what is learned in colour, their tokens, statistics, and what the gate finds; exit code 2 if it refuses.

    Example: samestep template preview asset:stdlib max_length=256 -n 2
    """
    quiet_libraries()
    from trainer.config import ModelConfig
    from trainer.data.gate import findings_of, statistics
    from trainer.data.instruct import build_instruct
    from trainer.model.architecture import load_tokenizer

    data = data_of(source, settings or [])
    tokenizer = load_tokenizer(ModelConfig(source=model, task="clm"))
    found = build_instruct(data, tokenizer)
    samples = found.train.samples
    facts = ", ".join(f"{name} {value:,.0f}" for name, value in statistics(samples).items())
    facts = f"{found.source_format} in template {found.format.name}: {facts}; {len(found.cut):,} cut, {len(found.left_out):,} left out"
    findings = list(findings_of(found, data, tokenizer))
    if page is not None:
        words = [finding.words for finding in findings]
        write_page(page, source, facts=facts, findings=words, samples=samples[:count], tokenizer=tokenizer)
    else:
        show(facts, samples[:count], tokenizer)
    refused = [finding.words for finding in findings if finding.name not in data.allow]
    if refused:
        raise DataError(f"the gate refuses {source}: " + "; ".join(refused))
    print("the gate finds nothing" if not findings else "\n".join(f"allowed: {finding.words}" for finding in findings))


def data_of(source: str, settings: list[str]) -> "InstructData":
    """The data section of these settings, which are those of data.*, with or without that prefix."""
    from trainer.config import InstructData, ModelConfig, RunConfig, TrainConfig
    from trainer.resolve import resolve

    words = [word if word.startswith("data.") else f"data.{word}" for word in settings]
    train = TrainConfig(max_steps=1, metric="loss")
    defaults = RunConfig(name="preview", model=ModelConfig(task="clm"), data=InstructData(source=source), train=train)
    if any("=" not in word for word in words):
        raise ConfigError(
            f"settings ({' '.join(settings)}): must be KEY=VALUE, such as max_length=256 or template=chatml"
        )
    data = resolve(RunConfig, defaults, words).config.data
    assert isinstance(data, InstructData)
    return data


def show(facts: str, samples: "list[Sample]", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Samples in the terminal: what is learned is green and underlined."""
    console = Console(soft_wrap=True, highlight=False)
    for sample in samples:
        text = Text()
        for piece, is_target in pieces(sample, tokenizer):
            text.append(piece, "green underline" if is_target else "dim")
        console.print(Text(f"{sample.place}: {len(sample.ids)} tokens, {int(sample.is_target.sum())} targets", "bold"))
        console.print(text)
        console.print(Text("ids " + " ".join(map(str, sample.ids.tolist())), "dim"))
        console.print()
    console.print(facts)


def pieces(sample: "Sample", tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens that are, or are not, targets."""
    start = 0
    for place in range(1, len(sample.ids) + 1):
        if place == len(sample.ids) or sample.is_target[place] != sample.is_target[start]:
            yield str(tokenizer.decode(sample.ids[start:place])), bool(sample.is_target[start])
            start = place


def write_page(
    path: Path,
    source: str,
    *,
    facts: str,
    findings: list[str],
    samples: "list[Sample]",
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """The same as one HTML file without scripts."""
    shown = []
    for sample in samples:
        marked = "".join(
            f"<mark>{html.escape(piece)}</mark>" if is_target else html.escape(piece)
            for piece, is_target in pieces(sample, tokenizer)
        )
        numbers = zip(sample.ids.tolist(), sample.is_target.tolist(), strict=True)
        ids = " ".join(f"<mark>{number}</mark>" if is_target else str(number) for number, is_target in numbers)
        shown.append(f'<h2>{html.escape(sample.place)}</h2>\n<pre>{marked}</pre>\n<p class="ids">{ids}</p>')
    text = PAGE.format(
        title=html.escape(f"What is learned of {source}"),
        facts=html.escape(facts),
        findings="".join(f'<p class="bad">{html.escape(words)}</p>' for words in findings),
        samples="\n".join(shown),
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html ({path}) cannot be written: {error.strerror or error}; give another path") from None
    print(f"wrote {path}")
