"""Chat templates as data: what stands around each turn, and what of it is learned. A built-in one or a user's YAML is a row of strings.

trainer/data/rendering.py makes text of them.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import ConfigError


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


MARKS = re.compile(r"\{(content|system|input)\}")


def parts_of(piece: str) -> list[tuple[str, bool]]:
    """Its literals, and the names in braces between them, which are marked by True."""
    return [(part, number % 2 == 1) for number, part in enumerate(MARKS.split(piece)) if part]


def filled(piece: str, **texts: str) -> str:
    """The piece with texts in place of {content} and the like; what stands in a text is left alone."""
    return "".join(texts[part] if is_name else part for part, is_name in parts_of(piece))


def load_template(name: str) -> Template:
    """A template by its name, or of a YAML file. ConfigError for mistakes."""
    if name in TEMPLATES:
        return TEMPLATES[name]
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
    return template


NEEDED: dict[str, tuple[str, ...]] = {
    "system": ("content",),
    "user": ("content",),
    "user_with_input": ("content", "input"),
    "first_user": ("system", "content"),
    "tool": ("content",),
    "answer": ("content",),
}
"""Piece -> the names in braces that it is filled with; every other piece is written as it stands."""


def _check_pieces(path: Path, template: Template) -> None:
    """ConfigError for a piece that leaves a text of its turn out, or names one that it is not filled with."""
    problems = []
    for name, piece in template.model_dump(exclude={"strip", "tokens"}, exclude_none=True).items():
        needed, found = NEEDED.get(name, ()), {part for part, is_name in parts_of(piece) if is_name}
        shown = f"data.template ({path}): {name} ({piece!r})"
        problems += [f"{shown} must hold {{{mark}}}" for mark in needed if mark not in found]
        problems += [f"{shown} is not filled with {{{mark}}}; take it out" for mark in sorted(found.difference(needed))]
    if template.system is not None and template.first_user is not None:
        problems.append(
            f"data.template ({path}): system and first_user are two places for one text; leave first_user out, or system"
        )
    if template.answer.rstrip().endswith("{content}"):
        problems.append(
            f"data.template ({path}): answer ({template.answer!r}) must end with what stops the model, such as {{eos}}"
        )
    if problems:
        raise ConfigError(*problems)
