"""Instruction pairs: what is a target and what is not, what is left out, and a training that learns responses."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.distributed.resume_runs import start
from tests.tiny import NUM_WORDS, tiny_llama, tiny_tokens
from trainer.config import InstructData, LoraConfig, ModelConfig, OptimConfig, PromptConfig, RunConfig, TrainConfig
from trainer.data.batches import IGNORED
from trainer.data.docstrings import INSTRUCTION, pairs_of_file
from trainer.data.instruct import build_instruct, tokenize_pairs
from trainer.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that pads with its end token, and pairs whose response follows from the prompt."""
    folder = tmp_path_factory.mktemp("instruct")
    tiny_llama(folder / "model")
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder / "model")).save_pretrained(folder / "model")
    tiny_tokens(folder / "tokens")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokens" / "tokenizer.json"), eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(80):
        words = [f"w{number}" for number in rng.integers(NUM_WORDS, size=int(rng.integers(1, 9)))]
        lines.append(json.dumps({"prompt": " ".join(words), "response": "w7 w8 w9"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_config(root: Path, run: Path, **changes: object) -> RunConfig:
    return RunConfig(
        name="instruct",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), task="clm"),
        method=LoraConfig(rank=4),
        data=InstructData(source=str(root / "pairs.jsonl"), max_length=40, validation_fraction=0.2),
        optim=OptimConfig(peak_lr=2e-2),
        train=TrainConfig(max_steps=8, global_batch_size=8, metric="loss", log_every=4, eval_every=4),
    ).model_copy(update=changes)


def test_targets_are_the_response_and_its_end_token_even_where_padding_is_the_end_token(root: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == NUM_WORDS
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    split = tokenize_pairs(["w10 w11", "w12"], ["w20", "w21 w22"], tokenizer)
    batch = split.batch(np.array([0, 1]), NUM_WORDS)
    end = NUM_WORDS
    assert batch["input_ids"].tolist() == [[1, 10, 11, 2, 20], [1, 12, 2, 21, 22]]
    none = IGNORED
    assert batch["labels"].tolist() == [[none, none, none, 20, end], [none, none, 21, 22, end]]
    padded = tokenize_pairs(["w10", "w10 w11 w12"], ["w20", "w20"], tokenizer).batch(np.array([0, 1]), NUM_WORDS)
    assert padded["labels"].tolist()[0] == [none, none, 20, end, none, none]
    assert padded["num_tokens"].tolist() == [4, 6]
    empty = split.batch(np.array([], np.int64), NUM_WORDS)
    assert empty["labels"].tolist() == [[none]]


def test_pairs_that_are_too_long_are_left_out_whole_and_the_split_is_disjoint(root: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    tokenizer.chat_template = "{{ messages[0]['content'] }} "
    data = InstructData(source=str(root / "pairs.jsonl"), max_length=8, validation_fraction=0.25)
    found = build_instruct(data, tokenizer)
    assert found.num_left_out > 0
    assert found.num_left_out + len(found.train) + len(found.validation) == 80
    assert max(len(row) for row in [*found.train.rows, *found.validation.rows]) == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "w1 " * 50, "response": "w2"}, r"data.max_length .8. tokens, and one is needed"),
        ({"prompt": "w1", "response": 3}, r"bad.jsonl:1: column response must hold text, not 3"),
        ({"prompt": " ", "response": "w2"}, r"bad.jsonl:1: column prompt must hold text"),
    ],
)
def test_pairs_that_cannot_be_learned_are_errors(
    line: dict[str, object], message: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(line) + "\n")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    with pytest.raises(DataError, match=message):
        build_instruct(InstructData(source=str(tmp_path / "bad.jsonl"), max_length=8), tokenizer)


def test_docstrings_are_taken_from_their_functions(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        'class A:\n    def f(self, x):\n        """Double x."""\n        return 2 * x\n\n    def g(self):\n        """Only this."""\n'
    )
    assert list(pairs_of_file(file)) == [(f"{INSTRUCTION}def f(self, x):\n    return 2 * x", "Double x.")]
    file.write_text("def broken(:\n")
    assert list(pairs_of_file(file)) == []


@pytest.mark.parametrize("method", [LoraConfig(rank=4), PromptConfig(num_virtual_tokens=3)], ids=["lora", "prompt"])
def test_training_learns_responses_and_ranks_agree_with_one_process(
    method: LoraConfig | PromptConfig, root: Path, tmp_path: Path
) -> None:
    single = start(run_config(root, tmp_path / "single", method=method), "single", 1)
    assert single is not None
    assert single[0]["error"] is None
    losses = [single[0]["losses"][step] for step in range(8)]
    ranks = start(run_config(root, tmp_path / "zero2", method=method), "zero2", 2)
    assert ranks is not None
    summed = [sum(facts["losses"][step] for facts in ranks) for step in range(8)]
    assert summed == pytest.approx(losses, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "single" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert evaluated[-1] < evaluated[0]
    assert "[...]" in (tmp_path / "single" / "samples.txt").read_text()
