"""Conversations of every format, and the mistakes in them, each named with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_instruct import PAIR, data, write
from trainer.config import InstructData
from trainer.data.conversations import Turn, read_conversations
from trainer.errors import DataError

SAME = {
    "messages": {"messages": [{"role": "system", "content": "S"}, *PAIR]},
    "sharegpt": {"system": "S", "conversations": [{"from": "human", "value": "Say a."}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"system": "S", "instruction": "Say a.", "input": "", "output": "a"},
}


@pytest.mark.parametrize("name", SAME)
def test_formats_are_recognized_and_mean_the_same(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [SAME[name]])
    found, conversations = read_conversations(data(path))
    assert found == name
    assert conversations[0].turns == (Turn("system", "S"), Turn("user", "Say a."), Turn("assistant", "a"))
    assert conversations[0].place == f"{path}:1"
    parquet = tmp_path / "chats.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([SAME[name]]), parquet)
    assert read_conversations(data(parquet))[1][0].turns == conversations[0].turns


def test_pairs_are_known_by_the_columns_that_the_settings_name(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"question": "Say a.", "output": "a"}])
    found, conversations = read_conversations(data(path, prompt="question", response="output", system="S"))
    assert found == "pairs"
    assert conversations[0].turns == (Turn("system", "S"), Turn("user", "Say a."), Turn("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": PAIR[::-1]}, "turn 1 is of assistant, and must be of system or user"),
        ({"messages": [PAIR[0], PAIR[0]]}, "turn 2 is of user, and after user comes assistant"),
        ({"messages": PAIR[:1]}, "the last turn is of user, and must be an answer of assistant"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " "}]}, "turn 2, an answer, is empty"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "turn 1: role .'narrator'. must be one of system, user"),
        ({"messages": [{"role": "user"}]}, "turn 1 must be an object with role and content"),
        ({"messages": [{"role": "user", "content": 3}]}, "turn 1: content must be text, not 3"),
        (
            {"messages": [PAIR[0], {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
            "turn 2 has tool_calls, which no template here writes",
        ),
        (
            {"messages": [PAIR[0], {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "turn 2 has fun",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}, PAIR[1]]},
            "turn 1 holds half of a surrogate pair.*ud800",
        ),
        ({"messages": "hello"}, "messages must be a list of turns, not 'hello'"),
        ({"messages": []}, "messages must be a list of turns"),
    ],
)
def test_a_conversation_that_is_none_is_named_with_its_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"messages": PAIR}, row])
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: {message}.* \(it holds "):
        read_conversations(data(path))


def test_lines_that_are_no_json_and_missing_fields_are_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": PAIR}) + "\nnot json\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:2: not JSON"):
        read_conversations(data(path))
    write(path, [{"instruction": "x", "output": "y"}, {"instruction": "x"}])
    with pytest.raises(DataError, match=r"chats\.jsonl:2: column output must hold text, not None"):
        read_conversations(data(path))
    write(path, [{"a": "x"}])
    with pytest.raises(DataError, match=r"data\.prompt \(prompt\): .* has no such column"):
        read_conversations(data(path))
    with pytest.raises(DataError, match="there is no such file"):
        read_conversations(data(tmp_path / "none.jsonl"))


def test_a_turn_that_calls_no_tool_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "chats.jsonl", [{"messages": [PAIR[0], PAIR[1] | {"tool_calls": None, "function_call": []}]}]
    )
    assert read_conversations(data(path))[1][0].turns[1] == Turn("assistant", "a")


def test_a_format_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format \(alpaca\) has no effect with source=asset:stdlib"):
        InstructData(format="alpaca")
    assert InstructData(format="pairs").format == "pairs"
