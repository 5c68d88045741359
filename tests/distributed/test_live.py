"""Text that is tokenized while it is read: every rank its own part, resumed exactly on as many ranks, refused on others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from tests.distributed.resume_runs import metrics_of, start
from tests.tiny import NUM_WORDS, tiny_llama, tiny_tokens
from trainer.config import LiveData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.data.stream.shards import ShardReader, read_manifest
from trainer.errors import ConfigError
from trainer.task.live import LiveTask

NUM_STEPS, LENGTH = 8, 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer beside the model's configuration, and documents as JSON lines."""
    folder = tmp_path_factory.mktemp("live")
    tiny_llama(folder / "model")
    tiny_tokens(folder / "tokens", documents=200)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokens" / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder / "model")
    lines = [json.dumps({"text": " ".join(f"w{word}" for word in words)}) for words in documents(folder)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "two").mkdir()
    (folder / "two" / "1.jsonl").write_text("\n".join(lines[:40]) + "\n")
    (folder / "two" / "2.jsonl").write_text("\n".join(lines[40:]) + "\n")
    return folder


def documents(root: Path) -> list[list[int]]:
    """The words of each document, without its end."""
    manifest, found = read_manifest(root / "tokens"), []
    for shard in manifest.shards:
        reader = ShardReader(root / "tokens", shard, manifest.dtype)
        tokens, begin = reader.tokens(0, shard.tokens).tolist(), 0
        for end in reader.ends.tolist():
            found.append(tokens[begin : end - 1])
            begin = end
    return found


def make_config(root: Path, run: Path, source: str = "text.jsonl") -> RunConfig:
    data = LiveData(source=str(root / source), sequence_length=LENGTH, validation_rows=5)
    train = TrainConfig(
        max_steps=NUM_STEPS,
        global_batch_size=6,
        micro_batch_size=2,
        log_every=1,
        save_every=2,
        eval_every=4,
        metric="loss",
    )
    model = ModelConfig(source=str(root / "model"), task="clm", init="random")
    return RunConfig(name="live", run_dir=run, model=model, data=data, optim=OptimConfig(peak_lr=1e-2), train=train)


def own_stream(root: Path, rank: int, world_size: int) -> list[int]:
    """The tokens of a rank's documents, one after the other: what its rows are cut from."""
    found, skipped, held = documents(root), 0, 0
    while held < 5 * LENGTH:  # held out for validation
        held += len(found[skipped]) + 1
        skipped += 1
    return [token for words in found[skipped:][rank::world_size] for token in (*words, NUM_WORDS)]


@pytest.mark.parametrize(("backend", "ranks", "source"), [("single", 1, "text.jsonl"), ("ddp", 2, "two")])
def test_each_rank_reads_its_part_and_goes_on_exactly(
    backend: str, ranks: int, source: str, root: Path, tmp_path: Path
) -> None:
    whole = start(make_config(root, tmp_path / "whole", source), backend, ranks)
    config = make_config(root, tmp_path / "run", source)
    assert start(config, backend, ranks, fault=f"step@{ranks - 1}:6") is None
    seen = start(config, backend, ranks)
    assert whole is not None
    assert seen is not None
    for rank in range(ranks):
        assert (whole[rank]["error"], seen[rank]["error"]) == (None, None)
        read = [token for step in range(NUM_STEPS) for row in whole[rank]["rows"][step] for token in row]
        assert read == own_stream(root, rank, ranks)[: len(read)]
        steps = sorted(seen[rank]["rows"])
        assert 0 < steps[0] <= 5
        assert all(seen[rank]["rows"][step] == whole[rank]["rows"][step] for step in steps)
    assert_same(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "whole"))


@pytest.mark.parametrize("source", ["text.jsonl", "two"])
def test_the_ranks_share_all_documents_but_those_held_out(source: str, root: Path, tmp_path: Path) -> None:
    tasks = [LiveTask(make_config(root, tmp_path, source), rank, 2) for rank in range(2)]
    read = [[example["text"] for example in task.rows.dataset] for task in tasks]
    texts = [json.loads(line)["text"] for line in (root / "text.jsonl").read_text().splitlines()]
    num_held_out = len(texts) - sum(map(len, read))
    assert 0 < num_held_out < 40
    assert sorted(read[0] + read[1]) == sorted(texts[num_held_out:])
    held_out = [token for words in documents(root)[:num_held_out] for token in (*words, NUM_WORDS)]
    for task in tasks:
        assert task.validation["input_ids"].ravel().tolist() == held_out[: 5 * LENGTH]


def test_a_tokenizer_in_python_is_refused(root: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "model")
    config = make_config(root, tmp_path)
    slow = config.model_copy(update={"model": config.model.model_copy(update={"source": str(tmp_path / "model")})})
    with pytest.raises(ConfigError, match=r"model\.source \(.*model\): its tokenizer, ByT5Tokenizer, has no fast form"):
        LiveTask(slow, 0, 1)


def assert_same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert one == two
    assert len(one) > NUM_STEPS


def test_another_number_of_ranks_is_refused(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    assert start(config, "ddp", 2, fault="step@0:6") is None
    seen = start(config, "single", 1)
    assert seen is not None
    assert "goes on only on 2 rank(s)" in seen[0]["error"]


def test_a_state_behind_steps_that_were_left_out_stands_behind_their_rows(root: Path, tmp_path: Path) -> None:
    def read(task: LiveTask, step: int) -> list[list[int]]:
        return [
            row
            for ids in np.split(task.global_batch(step), 3)
            for row in task.training_batch(ids)["input_ids"].tolist()
        ]

    whole, left_out = (LiveTask(make_config(root, tmp_path / "run"), 0, 1) for _ in range(2))
    rows = [read(whole, step) for step in range(5)]
    assert [read(left_out, step) for step in (0, 1)] == rows[:2]
    again = LiveTask(make_config(root, tmp_path / "run"), 0, 1)
    again.restore_rank_state(4, left_out.rank_state(4))  # a save right after steps 2 and 3, which a rollback left out
    assert read(again, 4) == read(left_out, 4) == rows[4]


def test_a_stream_that_ends_or_lacks_its_column_is_an_error(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    long = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 1000})})
    seen = start(long, "single", 1)
    assert seen is not None
    assert "is read to its end after" in seen[0]["error"]
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"column": "body"}), "run_dir": tmp_path / "b"}
    )
    seen = start(other, "single", 1)
    assert seen is not None
    assert "data.column (body) is no text column" in seen[0]["error"]
