"""The instruction-tuning recipes as they are, on a tiny model: each trains, answers, and says how to ask it."""

import importlib
import json
from pathlib import Path

import pytest

from tests.data.test_instruct import chats
from tests.data.test_templates import tokenizer
from tests.launch.test_template import tiny_chat_model
from tests.rank_pool import run_ranks
from trainer.model.export import load_exported
from trainer.resolve import run_recipe


def start_recipe(name: str, words: list[str]) -> None:
    """The recipe of that name with these words on its command line; in a process of its own."""
    recipe = importlib.import_module(f"recipes.{name}")
    run_recipe(recipe.main, recipe.DEFAULTS, words)


@pytest.mark.parametrize(("name", "method"), [("sft_full", "full"), ("sft_smollm2", "lora")])
def test_a_recipe_trains_a_tiny_model(name: str, method: str, tmp_path: Path) -> None:
    words = [
        f"model.source={tiny_chat_model(tmp_path / 'model', tokenizer())}",
        f"data.source={chats(tmp_path, count=40)}",
        f"run_dir={tmp_path / 'run'}",
        "data.generate=2",
        "data.new_tokens=4",
        "train.max_steps=3",
        "train.eval_every=3",
    ]
    run_ranks(start_recipe, "single", 1, args=(name, words))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/generated"] == 2
    _, written, info = load_exported(tmp_path / "run" / "model")
    assert info["method"] == method
    assert "### Response:" in str(written.chat_template)  # the model had no template
