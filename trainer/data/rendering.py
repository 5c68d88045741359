"""Conversations become text, and where in it the answers lie. Text in, text and spans out; no tokens.

A Template is filled in here; the tokenizer's own chat template is rendered by transformers in its sandbox. Invariant: targets come from
the structure, never from searching the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.data.conversations import Turn
from trainer.data.jinja import to_jinja
from trainer.data.templates import TEMPLATES, Template, filled, load_template
from trainer.data.time_limit import TooSlowError, time_limit
from trainer.errors import ConfigError, DataError

MOST_SECONDS = 10.0
"""That a model's own template may take for a conversation; usual ones take a thousandth of one."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """First and last + 1 character of each answer with what ends it, in the order of assistant turns; none of `rewritten` and before."""
    rewritten: int = 0
    """The last turn, from 1, that is written differently once others follow it: what it says here is never what the model is asked for."""


class Format(Protocol):
    """How conversations become text."""

    name: str

    @property
    def tokens(self) -> tuple[str, ...]:
        """What it writes that must be one token each, beside the tokenizer's begin and end of text."""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The whole conversation. DataError for turns that it cannot say."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The conversation up to where the next answer begins."""

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """The turns for `apply_chat_template`."""

    def jinja(self) -> str:
        """The same for `apply_chat_template`; saved with the model."""


class Structured:
    """A Template with the tokens of one tokenizer."""

    def __init__(self, name: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        """ConfigError where the tokenizer lacks one of its tokens."""
        self.name = name
        self.template = Template(**{key: _named(value, tokenizer) for key, value in template.model_dump().items()})
        vocabulary = tokenizer.get_vocab()
        lacking = [token for token in self.tokens if token not in vocabulary]
        pieces = template.model_dump_json()
        lacking += ["a begin-of-text token"] if "{bos}" in pieces and tokenizer.bos_token is None else []
        lacking += ["an end-of-text token"] if "{eos}" in pieces and tokenizer.eos_token is None else []
        if lacking:
            raise ConfigError(
                f"data.template ({name}): the model's tokenizer has no {', '.join(lacking)} as one token, so the model never learned "
                "what it means; use data.template=auto or alpaca, or a model made for this template"
            )

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.template.tokens

    def render(self, turns: Sequence[Turn]) -> Rendered:
        parts, answers, length = [self.template.begin], [], len(self.template.begin)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                before, answer = self.template.reply, filled(self.template.answer, content=self.content(turn))
                answers.append((length + len(before), length + len(before) + len(answer)))
                piece = before + answer + self.template.after
            else:
                piece = self.piece(turns, number)
            parts.append(piece)
            length += len(piece)
        return Rendered("".join(parts), tuple(answers))

    def prompt(self, turns: Sequence[Turn]) -> str:
        return self.render(turns).text + self.template.reply

    def piece(self, turns: Sequence[Turn], number: int) -> str:
        """What a turn that is no answer becomes, with the system text it may carry."""
        template, turn = self.template, turns[number]
        if turn.role == "system":
            return "" if template.system is None else filled(template.system, content=self.content(turn))
        if turn.role == "tool":
            if template.tool is None:
                raise DataError(f"template {self.name} has no tool turns; use another, or leave such conversations out")
            return filled(template.tool, content=self.content(turn))
        return self.user_piece(turns, number)

    def user_piece(self, turns: Sequence[Turn], number: int) -> str:
        """A user turn; the first one says the default system text, or carries a system text that has no turn of its own."""
        template, turn, content = self.template, turns[number], self.content(turns[number])
        has_system = number > 0 and turns[0].role == "system"
        is_first = number == (1 if has_system else 0)
        default = template.default_system_with_input if turn.input else template.default_system
        before = ""
        if is_first and not has_system and default is not None and template.system is not None:
            before = filled(template.system, content=default)
        joined = f"{content}\n\n{turn.input}" if turn.input else content
        if is_first and has_system and template.system is None:
            if template.first_user is None:
                raise DataError(
                    f"template {self.name} has no place for a system text; use another, or data.system=none"
                )
            return filled(template.first_user, content=joined, system=self.content(turns[0]))
        if turn.input and template.user_with_input is not None:
            return before + filled(template.user_with_input, content=content, input=turn.input)
        return before + filled(template.user, content=joined)

    def content(self, turn: Turn) -> str:
        """A turn's text."""
        return turn.content.strip() if self.template.strip else turn.content

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.content, "input": turn.input} for turn in turns]

    def jinja(self) -> str:
        return to_jinja(self.template)


class Own:
    """The chat template that the tokenizer brings, rendered by transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert tokenizer.chat_template is not None
        self.name, self.tokenizer = "the model's own", tokenizer

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Those that were added to the vocabulary and stand in the template; words of a domain (model.added_tokens) are no such marks."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(str(token) for token in added if not token.single_word and str(token) in self.jinja())

    def render(self, turns: Sequence[Turn]) -> Rendered:
        text, answers, rewritten = self.apply(turns), list[tuple[int, int]](), 0
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                asked = self.prompt(turns[:number])
                answered = text if number + 1 == len(turns) else self.apply(turns[: number + 1])
                if text.startswith(answered) and answered.startswith(asked):
                    answers.append((len(asked), len(answered) - len(self.after)))
                else:
                    answers, rewritten = [], number + 1
        return Rendered(text, tuple(answers), rewritten)

    def prompt(self, turns: Sequence[Turn]) -> str:
        return self.apply(turns, reply=True)

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.text} for turn in turns]

    def jinja(self) -> str:
        return cast(str, self.tokenizer.chat_template)

    def apply(self, turns: Sequence[Turn], *, reply: bool = False) -> str:
        """The text. DataError with the template's own words where it refuses, and where it takes too long."""
        apply = cast(Any, self.tokenizer).apply_chat_template
        try:
            with time_limit(MOST_SECONDS):
                return cast(str, apply(self.messages(turns), tokenize=False, add_generation_prompt=reply))
        except TooSlowError:
            raise DataError(
                f"the model's own template took more than {MOST_SECONDS:g} s for this conversation; use data.template=NAME"
            ) from None
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            raise DataError(f"the model's own template refuses this conversation: {error}") from None

    @cached_property
    def after(self) -> str:
        """What it writes behind the first special token after an answer, such as a line break: not learned, since that token stops."""
        mark = "an answer nobody gives"
        try:
            _, found, ending = self.apply([Turn("user", "a"), Turn("assistant", mark)]).rpartition(mark)
        except DataError as error:
            raise ConfigError(
                f"data.template (auto), for a question and its answer: {error}; use {OTHERWISE}"
            ) from None
        if not found:
            raise ConfigError(
                f"data.template (auto): the model's own template leaves an answer's text out; use {OTHERWISE}"
            )
        ends = [(ending.index(token), -len(token)) for token in special_texts(self.tokenizer, self) if token in ending]
        if not ends:
            raise ConfigError(
                f"data.template (auto): the model's own template ends an answer without a special token; use {OTHERWISE}"
            )
        start, negative_length = min(
            ends
        )  # the first one; some templates ask for the next answer behind it in any case
        return ending[start - negative_length :]


OTHERWISE = "data.template=NAME data.allow=template"
"""The way out where the model's own template does not do."""


def special_texts(tokenizer: PreTrainedTokenizerBase, found: Format) -> list[str]:
    """The texts of the tokens that no text is made of: begin, end, what the tokenizer calls special, and what the format names."""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*map(str, tokenizer.all_special_tokens), *special, *found.tokens})


def load_format(name: str, tokenizer: PreTrainedTokenizerBase) -> Format:
    """`auto`: the tokenizer's own, or alpaca where it has none; the name of a template; or a YAML file. ConfigError for mistakes."""
    if name == "auto" and tokenizer.chat_template is not None:
        return Own(tokenizer)
    if name == "auto":
        return Structured("alpaca", TEMPLATES["alpaca"], tokenizer)
    return Structured(name, load_template(name), tokenizer)


def _named(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A piece with the tokenizer's own tokens in place of {bos} and {eos}."""
    if isinstance(value, tuple | list):
        return tuple(word for word in (_named(item, tokenizer) for item in value) if word)
    if not isinstance(value, str):
        return value
    return value.replace("{bos}", str(tokenizer.bos_token or "")).replace("{eos}", str(tokenizer.eos_token or ""))
