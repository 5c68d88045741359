"""Chat templates as data: what stands around each turn, and what of it is learned. Text in, text and spans out; no tokens.

A built-in template, or a user's own in YAML, is a row of strings; the tokenizer's own chat template is rendered by transformers in its
sandbox. Invariant: targets come from the structure, never from searching the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import yaml
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from trainer.data.conversations import Turn
from trainer.errors import ConfigError, DataError


class Template(BaseModel):
    """What stands around the turns of a conversation. {content} is the turn's text, {bos} and {eos} are the tokenizer's tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: str = ""
    """Once, before everything."""
    system: str | None = None
    """A system turn. None: its text goes into the first user turn, as `first_user` says."""
    first_user: str | None = None
    """A first user turn that carries the {system} text, for templates without system turns."""
    user: str
    """A user turn."""
    user_with_input: str | None = None
    """One that has an {input} beside its {content}, as Alpaca's. None: the input follows the content after an empty line."""
    tool: str | None = None
    """What a tool returned. None: such turns are refused."""
    reply: str = ""
    """Before an answer; the last thing a prompt holds."""
    answer: str
    """The answer and what ends it: all of this is learned."""
    after: str = ""
    """Behind an answer; not learned."""
    default_system: str | None = None
    """Where a conversation has no system turn."""
    default_system_with_input: str | None = None
    """The same, where its first user turn has an input."""
    strip: bool = False
    """Contents lose the white space around them."""
    tokens: tuple[str, ...] = ()
    """What the tokenizer must hold as one token each."""


def _headers(
    head: str, end: str, *, begin: str = "", system: bool = True, tool: str | None = None, **more: Any
) -> Template:
    """A template whose turns look alike: a header with the role's name, the content, an end."""
    parts = {role: head.replace("ROLE", role) for role in ("system", "user", "assistant")}
    return Template(
        begin=begin,
        system=f"{parts['system']}{{content}}{end}" if system else None,
        user=f"{parts['user']}{{content}}{end}",
        tool=f"{head.replace('ROLE', tool)}{{content}}{end}" if tool else None,
        reply=parts["assistant"],
        answer="{content}" + end.rstrip("\n"),
        after=end[len(end.rstrip("\n")) :],
        **more,
    )


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n",
        user_with_input="### Instruction:\n{content}\n\n### Input:\n{input}\n\n",
        reply="### Response:\n",
        answer="{content}{eos}",
        after="\n\n",
        default_system=ALPACA.format(""),
        default_system_with_input=ALPACA.format(", paired with an input that provides further context"),
    ),
    "chatml": _headers("<|im_start|>ROLE\n", "<|im_end|>\n", tool="tool", tokens=("<|im_start|>", "<|im_end|>")),
    "llama2": Template(
        user="{bos}[INST] {content} [/INST]",
        first_user="{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
        answer=" {content} {eos}",
        strip=True,
        tokens=("{bos}", "{eos}"),
    ),
    "llama3": _headers(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n",
        "<|eot_id|>",
        begin="{bos}",
        tool="ipython",
        strip=True,
        tokens=("{bos}", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Template(
        begin="{bos}",
        user=" [INST] {content} [/INST]",
        first_user=" [INST] {system}\n\n{content} [/INST]",
        answer=" {content}{eos}",
        tokens=("{bos}", "{eos}"),
    ),
    "gemma": Template(
        begin="{bos}",
        user="<start_of_turn>user\n{content}<end_of_turn>\n",
        first_user="<start_of_turn>user\n{system}\n\n{content}<end_of_turn>\n",
        reply="<start_of_turn>model\n",
        answer="{content}<end_of_turn>",
        after="\n",
        strip=True,
        tokens=("{bos}", "<start_of_turn>", "<end_of_turn>"),
    ),
    "zephyr": _headers("<|ROLE|>\n", "{eos}\n", tokens=("{eos}",)),
    "phi": _headers("<|ROLE|>\n", "<|end|>\n", tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "plain": Template(system="{content}\n\n", user="{content}\n", answer="{content}{eos}", after="\n\n"),
}
"""Written from the formats that the models' authors published: Stanford Alpaca's README; OpenAI's ChatML; Llama 2 and Llama 3 model
cards; Mistral-7B-Instruct-v0.2, gemma-2-it (system text as in gemma-3), zephyr-7b-beta and Phi-3 tokenizer configurations."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """First and last + 1 character of each answer with what ends it, in the order of assistant turns."""


class Format(Protocol):
    """How conversations become text."""

    name: str

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The whole conversation. DataError for turns that it cannot say."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The conversation up to where the next answer begins."""

    def jinja(self) -> str:
        """The same for `apply_chat_template`; saved with the model."""


class Structured:
    """A Template with the tokens of one tokenizer."""

    def __init__(self, name: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        """ConfigError where the tokenizer lacks one of its tokens."""
        self.name = name
        self.template = Template(**{key: _named(value, tokenizer) for key, value in template.model_dump().items()})
        vocabulary = tokenizer.get_vocab()
        lacking = [token for token in self.template.tokens if token not in vocabulary]
        if "{eos}" in template.answer and tokenizer.eos_token is None:
            lacking.append("an end-of-text token")
        if lacking:
            raise ConfigError(
                f"data.template ({name}): the model's tokenizer has no {', '.join(lacking)} as one token, so the model never learned "
                "what it means; use data.template=auto or alpaca, or a model made for this template"
            )

    def render(self, turns: Sequence[Turn]) -> Rendered:
        parts, answers, length = [self.template.begin], [], len(self.template.begin)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                before, answer = self.template.reply, _filled(self.template.answer, content=self.content(turn))
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
            return "" if template.system is None else _filled(template.system, content=self.content(turn))
        if turn.role == "tool":
            if template.tool is None:
                raise DataError(f"template {self.name} has no tool turns; use another, or leave such conversations out")
            return _filled(template.tool, content=self.content(turn))
        return self.user_piece(turns, number)

    def user_piece(self, turns: Sequence[Turn], number: int) -> str:
        """A user turn; the first one says the default system text, or carries a system text that has no turn of its own."""
        template, turn, content = self.template, turns[number], self.content(turns[number])
        has_system = number > 0 and turns[0].role == "system"
        is_first = number == (1 if has_system else 0)
        default = template.default_system_with_input if turn.input else template.default_system
        before = ""
        if is_first and not has_system and default is not None and template.system is not None:
            before = _filled(template.system, content=default)
        if turn.input and template.user_with_input is not None:
            return before + _filled(template.user_with_input, content=content, input=turn.input)
        content = f"{content}\n\n{turn.input}" if turn.input else content
        if is_first and has_system and template.system is None:
            if template.first_user is None:
                raise DataError(
                    f"template {self.name} has no place for a system text; use another, or data.system=none"
                )
            return _filled(template.first_user, content=content, system=self.content(turns[0]))
        return before + _filled(template.user, content=content)

    def content(self, turn: Turn) -> str:
        """A turn's text."""
        return turn.content.strip() if self.template.strip else turn.content

    def jinja(self) -> str:
        template = self.template
        content = "message['content'] | trim" if template.strip else "message['content']"
        system = _expression(template.system, content) if template.system is not None else None
        lines = [
            f"{{{{- {_quoted(template.begin)} }}}}" if template.begin else "",
            *_jinja_defaults(template, system),
            "{%- for message in messages %}",
            "{%- if message['role'] == 'system' %}",
            f"{{{{- {system} }}}}" if system else "",
            "{%- elif message['role'] == 'user' %}",
            *_jinja_user(template, content),
            *(
                ["{%- elif message['role'] == 'tool' %}", f"{{{{- {_expression(template.tool, content)} }}}}"]
                if template.tool
                else []
            ),
            "{%- elif message['role'] == 'assistant' %}",
            f"{{{{- {_quoted(template.reply)} }}}}" if template.reply else "",
            f"{{%- generation %}}{{{{- {_expression(template.answer, content)} }}}}{{%- endgeneration %}}",
            f"{{{{- {_quoted(template.after)} }}}}" if template.after else "",
            "{%- else %}",
            "{{- raise_exception('a turn must be of system, user, assistant or tool, not ' + message['role']) }}",
            "{%- endif %}",
            "{%- endfor %}",
            f"{{%- if add_generation_prompt %}}{{{{- {_quoted(template.reply)} }}}}{{%- endif %}}"
            if template.reply
            else "",
        ]
        return "\n".join(filter(None, lines))


def _jinja_defaults(template: Template, system: str | None) -> list[str]:
    """The default system text, before the first turn."""
    if template.default_system is None or template.system is None:
        return []
    plain = _quoted(_filled(template.system, content=template.default_system))
    lines = ["{%- if messages and messages[0]['role'] == 'user' %}"]
    if template.default_system_with_input is not None:
        with_input = _quoted(_filled(template.system, content=template.default_system_with_input))
        lines += [f"{{{{- {with_input} if messages[0]['input'] else {plain} }}}}"]
    else:
        lines += [f"{{{{- {plain} }}}}"]
    return [*lines, "{%- endif %}"]


def _jinja_user(template: Template, content: str) -> list[str]:
    """A user turn, with the system text or the input that it carries."""
    joined = f"(({content}) + ('\\n\\n' + message['input'] if message['input'] else ''))"
    lines = [f"{{{{- {_expression(template.user, joined)} }}}}"]
    if template.user_with_input is not None:
        with_input = _expression(template.user_with_input, content, input="message['input']")
        lines = ["{%- if message['input'] %}", f"{{{{- {with_input} }}}}", "{%- else %}", *lines, "{%- endif %}"]
    if template.first_user is not None:
        system = "messages[0]['content'] | trim" if template.strip else "messages[0]['content']"
        first = _expression(template.first_user, joined, system=f"({system})")
        test = "{%- if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
        lines = [test, f"{{{{- {first} }}}}", "{%- else %}", *lines, "{%- endif %}"]
    return lines


def _expression(piece: str, content: str, **more: str) -> str:
    """A Jinja expression for a piece: its literals, with expressions in place of {content} and the like."""
    found = [piece]
    for name, expression in {"content": content, **more}.items():
        found = [part for text in found for part in _interleaved(text, f"{{{name}}}", f"({expression})")]
    return " ~ ".join(
        part if part.startswith("(") and part in _marks(content, more) else _quoted(part) for part in found if part
    )


def _marks(content: str, more: dict[str, str]) -> set[str]:
    return {f"({expression})" for expression in (content, *more.values())}


def _interleaved(text: str, mark: str, between: str) -> list[str]:
    """The parts of a text around a mark, with `between` in its places."""
    parts = text.split(mark)
    return [word for number, part in enumerate(parts) for word in ((between, part) if number else (part,))]


def _quoted(text: str) -> str:
    """A literal for Jinja."""
    escaped = (
        text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    )
    return f"'{escaped}'"


def _named(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A piece with the tokenizer's own tokens in place of {bos} and {eos}."""
    if isinstance(value, tuple | list):
        return tuple(word for word in (_named(item, tokenizer) for item in value) if word)
    if not isinstance(value, str):
        return value
    return value.replace("{bos}", str(tokenizer.bos_token or "")).replace("{eos}", str(tokenizer.eos_token or ""))


def _filled(piece: str, **texts: str) -> str:
    """The piece with texts in place of {content} and the like; what stands in a text is left alone."""
    parts = [piece]
    for name, text in texts.items():
        parts = [
            word
            for part in parts
            for word in (_interleaved(part, f"{{{name}}}", "\0" + text) if not part.startswith("\0") else [part])
        ]
    return "".join(part.removeprefix("\0") for part in parts)


class Own:
    """The chat template that the tokenizer brings, rendered by transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert tokenizer.chat_template is not None
        self.name, self.tokenizer = "the model's own", tokenizer
        self.after = self.text_after_an_answer()

    def render(self, turns: Sequence[Turn]) -> Rendered:
        text, answers = self.apply(turns), []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                start, end = len(self.prompt(turns[:number])), len(self.apply(turns[: number + 1]))
                if not text.startswith(self.apply(turns[: number + 1])) or not text.startswith(
                    self.prompt(turns[:number])
                ):
                    raise DataError(
                        f"the model's own template writes turn {number + 1} differently once others follow it, so what is learned would "
                        "not be what the model is asked for; use data.template=NAME or data.learn=last"
                    )
                answers.append((start, end - len(self.after)))
        return Rendered(text, tuple(answers))

    def prompt(self, turns: Sequence[Turn]) -> str:
        return self.apply(turns, reply=True)

    def jinja(self) -> str:
        return cast(str, self.tokenizer.chat_template)

    def apply(self, turns: Sequence[Turn], *, reply: bool = False) -> str:
        """The text. DataError with the template's own words where it refuses."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return cast(
                str,
                cast(Any, self.tokenizer).apply_chat_template(messages, tokenize=False, add_generation_prompt=reply),
            )
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

    def text_after_an_answer(self) -> str:
        """What it writes behind the token that ends an answer, such as a line break: not learned, since nothing generates it."""
        mark = "an answer nobody gives"
        text = self.apply([Turn("user", "a"), Turn("assistant", mark)])
        ending = text[text.rindex(mark) + len(mark) :]
        ends = [ending.rindex(token) + len(token) for token in special_texts(self.tokenizer) if token in ending]
        if not ends:
            raise ConfigError(
                "data.template (auto): the model's own template ends an answer without a special token; use data.template=NAME"
            )
        return ending[max(ends) :]


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the tokens that no text is made of: begin, end, and those that were added to the vocabulary."""
    return sorted({str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())})


def load_format(name: str, tokenizer: PreTrainedTokenizerBase) -> Format:
    """`auto`: the tokenizer's own, or alpaca where it has none; the name of a template; or a YAML file. ConfigError for mistakes."""
    if name == "auto" and tokenizer.chat_template is not None:
        return Own(tokenizer)
    if name == "auto":
        return Structured("alpaca", TEMPLATES["alpaca"], tokenizer)
    if name in TEMPLATES:
        return Structured(name, TEMPLATES[name], tokenizer)
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ConfigError(f"data.template ({name}): must be auto, {', '.join(TEMPLATES)}, or a YAML file that exists")
    try:
        template = Template.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"data.template ({path}) cannot be read: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        problems = [
            f"data.template ({path}): {'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}"
            for each in error.errors()
        ]
        raise ConfigError(*problems) from None
    _check_pieces(path, template)
    return Structured(path.name, template, tokenizer)


def _check_pieces(path: Path, template: Template) -> None:
    """ConfigError for a piece that leaves its turn's text out."""
    wanted = {
        "system": "{content}",
        "user": "{content}",
        "answer": "{content}",
        "tool": "{content}",
        "first_user": "{system}",
    }
    problems = [
        f"data.template ({path}): {name} ({piece!r}) must hold {mark}"
        for name, mark in wanted.items()
        if (piece := getattr(template, name)) is not None and mark not in piece
    ]
    if template.answer.rstrip().endswith("{content}"):
        problems.append(
            f"data.template ({path}): answer ({template.answer!r}) must end with what stops the model, such as {{eos}}"
        )
    if problems:
        raise ConfigError(*problems)
