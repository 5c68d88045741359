"""The recipes as they are, for a few steps: each trains, evaluates, exports and reports; tiny models where the recipe's own is large."""

import importlib
import json
from pathlib import Path

import pytest

from tests.data.test_instruct import chats
from tests.data.test_templates import tokenizer
from tests.launch.test_template import tiny_chat_model
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences, tiny_writer
from trainer.model.export import load_exported
from trainer.resolve import run_recipe


def start_recipe(name: str, words: list[str]) -> None:
    """The recipe of that name with these words on its command line; in a process of its own."""
    recipe = importlib.import_module(f"recipes.{name}")
    run_recipe(recipe.main, recipe.DEFAULTS, words)


@pytest.mark.parametrize(("name", "method"), [("sft_full", "full"), ("sft_smollm2", "lora")])
def test_a_recipe_for_conversations_trains_a_tiny_model_and_says_how_to_ask_it(
    name: str, method: str, tmp_path: Path
) -> None:
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


ROWS = "data.validation_rows=8"
OTHERS: dict[str, tuple[str, ...]] = {
    "full_sst2": ("train.num_epochs=none",),
    "head_sst2": ("train.num_epochs=none",),
    "ner": (),
    "pretrain_bart": (ROWS,),
    "pretrain_mlm": (ROWS,),
    "pretrain_t5": (ROWS,),
    "pretrain_xlnet": (ROWS,),
    "qa": (ROWS,),
    "qlora_instruct": ("data.generate=2", "data.new_tokens=4"),
    "summarize": (ROWS, "data.generate=2", "data.new_tokens=4"),
}


def tiny_parts(name: str, folder: Path) -> list[str]:
    """Settings of a tiny model and data, where the recipe's own would take long."""
    if name.endswith("_sst2"):
        return [f"model.source={tiny_bert(folder / 'bert')}", f"data.source={tiny_sentences(folder / 'data.csv')}"]
    if name == "qlora_instruct":
        model = tiny_chat_model(folder / "model", tokenizer())
        return [f"model.source={model}", f"data.source={chats(folder, count=40)}"]
    if name == "summarize":
        return [f"model.source={tiny_writer(folder / 'model')}"]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_recipe_leaves_a_whole_run(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [f"run_dir={run}", "train.max_steps=2", "train.eval_every=2", "train.log_every=1"]
    run_ranks(start_recipe, "single", 1, args=(name, [*words, *OTHERS[name], *tiny_parts(name, tmp_path)]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    assert any("eval/loss" in line or "eval/accuracy" in line for line in lines)
    assert json.loads((run / "outcome.json").read_text()) == {"outcome": "finished", "step": 2}
    load_exported(run / "model")
    log = (run / "log.txt").read_text()
    assert f"run directory: {run}" in log
    if name == "pretrain_mlm":  # MiniLM comes without a head for masks
        assert "cls.predictions" in log
