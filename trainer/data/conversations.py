"""Conversations of a source, whatever format it is in: pairs, Alpaca, ShareGPT or OpenAI's messages. Text only; no tokens.

First stop of instruction data: trainer/data/rendering.py makes text of them. Invariant: a conversation holds at least one answer, roles
in an order that a chat can have, and no empty answer; anything else is an error that names file and line.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.config import InstructData
from trainer.data.docstrings import docstring_file
from trainer.data.sources import check_path, hub_table, is_hub_id, load_hub
from trainer.data.tables import Table, columns_of, read_file, surrogate_problem
from trainer.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "pairs": (),
}
"""Format -> the columns it is known by, in the order in which they are looked for. Pairs are known by data.prompt and data.response."""
OPTIONAL = {"messages": (), "sharegpt": ("system",), "alpaca": ("input", "system"), "pairs": ()}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_response": "tool",
}
CALLS = ("tool_calls", "function_call")
"""Where a turn of messages says what it asks tools for, beside its content."""
MOST_SHOWN, SHOWN = 5, 100
"""Mistakes of a source that are listed, and characters of each that are shown."""


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    """system, user, assistant or tool."""
    content: str
    input: str = ""
    """Alpaca's further context of a user turn."""

    @property
    def text(self) -> str:
        """Content and input together, for templates that know no input."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


@dataclass(frozen=True)
class Conversation:
    """Turns and where they stand."""

    turns: tuple[Turn, ...]
    place: str
    """Such as chats.jsonl:17."""


def read_conversations(data: InstructData) -> tuple[str, list[Conversation]]:
    """The format and every conversation of `data.source`. DataError lists what cannot be learned from, with file and line."""
    table, found = read_table(data)
    conversations: list[Conversation] = []
    problems = [f"{table.place(bad.line)}: {bad.reason}" for bad in table.malformed]
    for number, line in enumerate(table.lines):
        row = {name: values[number] for name, values in table.columns.items()}
        try:
            turns = turns_of(row, found, data)
            check_turns(turns)
        except DataError as error:
            problems.append(f"{table.place(line)}: {error} (it holds {str(row)[:SHOWN]})")
            continue
        conversations.append(Conversation(turns, table.place(line)))
    if problems:
        more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise DataError("; ".join(problems[:MOST_SHOWN]) + more + "; correct them, or take them out")
    return found, conversations


def read_table(data: InstructData) -> tuple[Table, str]:
    """The columns of the format that the source is in, and its name."""
    if data.source == "asset:stdlib":
        return read_file(
            docstring_file(), {"data.prompt": data.prompt, "data.response": data.response}, kind="asset"
        ), "pairs"
    if is_hub_id(data.source):
        dataset = load_hub(data.source, data.subset, data.split, "data.source")
        columns, found = columns_to_read(dataset.column_names, data)
        return hub_table(dataset, f"{data.source}[{data.split}]", columns), found
    path = check_path(data.source, "data.source")
    columns, found = columns_to_read(columns_of(path), data)
    return read_file(path, columns), found


def columns_to_read(present: Sequence[str], data: InstructData) -> tuple[dict[str, str], str]:
    """Setting -> column, and the format: the one that is asked for, or the first whose columns are there."""
    pairs = (data.prompt, data.response)
    found: str = data.format
    if found == "auto":
        known = [name for name, columns in FORMATS.items() if columns and set(columns) <= set(present)]
        found = "pairs" if set(pairs) <= set(present) or not known else known[0]
    if found == "pairs":
        return {"data.prompt": data.prompt, "data.response": data.response}, "pairs"
    names = [*FORMATS[found], *(name for name in OPTIONAL[found] if name in present)]
    return {f"data.format={found}, {name}": name for name in names}, found


def turns_of(row: Mapping[str, object], found: str, data: InstructData) -> tuple[Turn, ...]:
    """The turns of one row. DataError without a place, which the caller knows."""
    if found == "pairs":
        turns = [Turn("user", _text(row, data.prompt)), Turn("assistant", _text(row, data.response))]
    elif found == "alpaca":
        user = Turn("user", _text(row, "instruction"), _optional(row, "input"))
        turns = [*_system(row), user, Turn("assistant", _text(row, "output"))]
    elif found == "sharegpt":
        turns = [*_system(row), *_listed(row["conversations"], "conversations", "from", "value")]
    else:
        turns = list(_listed(row["messages"], "messages", "role", "content"))
    if data.system is not None and turns[0].role != "system":
        turns.insert(0, Turn("system", data.system))
    return tuple(turns)


def check_turns(turns: Sequence[Turn]) -> None:
    """DataError for an order that no chat has."""
    after = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
    for number, (turn, following) in enumerate(itertools.zip_longest(turns, turns[1:])):
        if number == 0 and turn.role not in ("system", "user"):
            raise DataError(f"turn 1 is of {turn.role}, and must be of system or user")
        if problem := surrogate_problem(turn.text):
            raise DataError(f"turn {number + 1} {problem}")
        if turn.role == "assistant" and not turn.content.strip():
            raise DataError(f"turn {number + 1}, an answer, is empty, so a model would learn to say nothing")
        if following is not None and following.role not in after[turn.role]:
            raise DataError(
                f"turn {number + 2} is of {following.role}, and after {turn.role} comes {' or '.join(after[turn.role])}"
            )
    if turns[-1].role != "assistant":
        raise DataError(f"the last turn is of {turns[-1].role}, and must be an answer of assistant")


def _listed(value: object, column: str, role_key: str, text_key: str) -> Iterator[Turn]:
    """The turns of a list of objects."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{column} must be a list of turns, not {value!r:.60}")
    for number, item in enumerate(value, start=1):
        calls = [key for key in CALLS if isinstance(item, dict) and item.get(key)]
        if calls:
            raise DataError(
                f"turn {number} has {calls[0]}, which no template here writes and a model would so not learn; write the call into the "
                "turn's text, or leave such conversations out"
            )
        if not isinstance(item, dict) or role_key not in item or text_key not in item:
            raise DataError(f"turn {number} must be an object with {role_key} and {text_key}, not {item!r:.80}")
        role, text = item[role_key], item[text_key]
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise DataError(f"turn {number}: {role_key} ({role!r:.40}) must be one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise DataError(f"turn {number}: {text_key} must be text, not {text!r:.60}")
        yield Turn(role, text)


def _system(row: Mapping[str, object]) -> list[Turn]:
    text = _optional(row, "system")
    return [Turn("system", text)] if text else []


def _text(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"column {column} must hold text, not {value!r:.60}")
    return value


def _optional(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"column {column} must hold text, not {value!r:.60}")
    return value or ""
