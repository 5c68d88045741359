"""The gate: what silently spoils instruction tuning, looked for in the whole set before any step is taken.

Each mistake is an error with an example; `data.allow` turns it by name into a line on the screen. Local to the process.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.config import InstructData
from trainer.data.batches import IGNORED
from trainer.data.conversations import Turn
from trainer.data.instruct import InstructSet, Sample
from trainer.data.rendering import Own, special_texts
from trainer.errors import DataError

MOST_LOST = 0.5
"""Share of conversations that may be cut or left out."""
SHOWN = 120
"""Characters of an example."""


@dataclass(frozen=True)
class Finding:
    """One kind of mistake."""

    name: str
    """What `data.allow` calls it."""
    words: str
    """How many samples, what is wrong, an example, what to do."""


def check(found: InstructSet, data: InstructData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Raise DataError with every mistake that is not allowed; the words of those that are."""
    findings = list(findings_of(found, data, tokenizer))
    errors = [finding for finding in findings if finding.name not in data.allow]
    if errors:
        fixes = "; ".join(f"{finding.words} (data.allow={finding.name} trains all the same)" for finding in errors)
        raise DataError(f"data.source ({data.source}): {fixes}")
    return [finding.words for finding in findings]


def findings_of(found: InstructSet, data: InstructData, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Every kind of mistake that is there."""
    samples = [*found.train.samples, *found.validation.samples]
    stop, bos = stop_tokens(tokenizer, found), tokenizer.bos_token_id
    forged = set(places_with_special_tokens(found, tokenizer))
    tests: dict[str, tuple[str, Callable[[Sample], bool], str]] = {
        "no_target": ("have nothing to learn", lambda s: not s.is_target[1:].any(), "take them out"),
        "no_stop": (
            "have an answer whose end is not learned or ends no generation, so the model would never stop",
            lambda s: not stops(s, stop, data),
            "let the template's answer end with a token that ends generation, such as {eos}",
        ),
        "two_bos": (
            "begin with two begin-of-text tokens",
            lambda s: bos is not None and len(s.ids) > 1 and s.ids[0] == s.ids[1] == bos,
            "leave it out of the template, or out of the texts",
        ),
        "prompt_learned": (
            "learn something that is in no answer",
            lambda s: data.learn != "everything" and learns_prompt(s),
            "let the template write what comes before an answer where add_generation_prompt is set",
        ),
        "straddle": (
            "have a token that belongs to the prompt and to the answer behind it",
            lambda s: s.straddles,
            "let the template's reply end with a line break, or take the white space off the answers",
        ),
        "special_token": (
            "hold a special token in what somebody says, who could so speak for others",
            lambda s: s.place in forged,
            "take it out of the texts",
        ),
    }
    for name, (words, is_wrong, fix) in tests.items():
        wrong = [sample for sample in samples if is_wrong(sample)]
        if wrong:
            yield Finding(
                name, f"{len(wrong):,} of {len(samples):,} samples {words}; {example(wrong[0], tokenizer)}; {fix}"
            )
    yield from set_findings(found, data, tokenizer)


def set_findings(found: InstructSet, data: InstructData, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Mistakes of the set as a whole: the mask of a batch, what was lost, another template than the model's."""
    wrong = list(rows_with_other_targets(found, tokenizer))
    if wrong:
        yield Finding(
            "padding",
            f"{len(wrong):,} rows of batches have other targets than their samples, which padding hides or adds; such as that of "
            f"{wrong[0]}; give the tokenizer a padding token of its own",
        )
    total = len(found.conversations) - data.few_shot
    lost = (*found.left_out, *found.cut)
    if len(lost) > MOST_LOST * total:
        yield Finding(
            "truncated",
            f"{len(lost):,} of {total:,} conversations are longer than data.max_length ({data.max_length}) and lose turns, "
            f"{len(found.left_out):,} of them all; such as {lost[0]}; raise it",
        )
    if tokenizer.chat_template is not None and not isinstance(found.format, Own):
        yield from template_findings(found, data, tokenizer)


def template_findings(found: InstructSet, data: InstructData, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether the template that was chosen writes what the model's own does; the first conversation that differs."""
    for probe in probes(found, data):
        chosen = found.format.render(probe).text
        own: str | None = None
        try:
            own = Own(tokenizer).apply(probe)
            words = f"and the template that the model was trained with and comes with writes {own[:SHOWN]!r}; use data.template=auto"
        except DataError as error:
            words = f"and of the one that the model comes with: {error}"
        if own != chosen:
            yield Finding("template", f"data.template ({data.template}) writes {chosen[:SHOWN]!r}, {words}")
            return


def probes(found: InstructSet, data: InstructData) -> Iterator[list[Turn]]:
    """Short conversations with the roles that the set has: without system text where there may be none, with one, with a tool."""
    roles = {turn.role for conversation in found.conversations for turn in conversation.turns}
    talk = [Turn("user", "Hello."), Turn("assistant", "Hi."), Turn("user", "Bye."), Turn("assistant", "Bye.")]
    if data.system is None:
        yield talk
    if data.system is not None or "system" in roles:
        yield [Turn("system", data.system or "Be brief."), *talk]
    if "tool" in roles:
        system = [] if data.system is None else [Turn("system", data.system)]
        yield [*system, *talk[:2], Turn("tool", "4"), Turn("assistant", "Four.")]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, found: InstructSet) -> set[int]:
    """Tokens that end generation: the tokenizer's end of text, and what an answer ends with, if that is a special token."""
    sample = found.train.samples[0]
    end = int(sample.ids[sample.answers[0][1] - 1])
    special = {tokenizer.convert_tokens_to_ids(token) for token in special_texts(tokenizer, found.format)}
    return {int(number) for number in (tokenizer.eos_token_id, end) if number is not None and number in special}


def stops(sample: Sample, stop: set[int], data: InstructData) -> bool:
    """Whether the end of every answer that is learned is a target, and ends generation."""
    learned = sample.answers[-1:] if data.learn == "last" else sample.answers
    return all(bool(sample.is_target[last - 1]) and int(sample.ids[last - 1]) in stop for _, last in learned)


def learns_prompt(sample: Sample) -> bool:
    """Whether a target lies outside of all answers, or what stands there as an answer begins with something else."""
    outside = sample.is_target.copy()
    for first, last in sample.answers:
        outside[first:last] = False
    return bool(outside.any()) or sample.begins_otherwise


def places_with_special_tokens(found: InstructSet, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Conversations in which a turn's text holds the text of a special token."""
    tokens = special_texts(tokenizer, found.format)
    for conversation in found.conversations:
        if any(token in turn.text for turn in conversation.turns for token in tokens):
            yield conversation.place


def rows_with_other_targets(found: InstructSet, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Places of rows, in batches of 64, that hold other numbers of targets than their samples."""
    padding = int(tokenizer.pad_token_id or 0)
    for split in (found.train, found.validation):
        for start in range(0, len(split), 64):
            places = np.arange(start, min(start + 64, len(split)))
            masked = (split.batch(places, padding)["labels"] != IGNORED).sum(dim=1).tolist()
            for place, count in zip(places, masked, strict=True):
                samples = [split.samples[index] for index in split.rows[place]]
                if count != sum(int(sample.is_target[1:].sum()) for sample in samples):
                    yield samples[0].place


def example(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Where a sample stands, and how it begins."""
    text = tokenizer.decode(sample.ids[:64])
    return f"such as {sample.place}: {text[:SHOWN]!r}"


def statistics(split: Sequence[Sample]) -> dict[str, float]:
    """samples, tokens, targets, and the mean and largest length."""
    lengths = np.array([len(sample.ids) for sample in split])
    return {
        "samples": len(split),
        "tokens": int(lengths.sum()),
        "targets": int(sum(sample.is_target.sum() for sample in split)),
        "mean length": float(lengths.mean()),
        "longest": int(lengths.max()),
    }
