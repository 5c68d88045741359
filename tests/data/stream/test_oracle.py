"""Streams against an oracle that shares no line with them: whole global batches, over any chain of topologies, sources and settings."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.stream.oracle import Rules, documents_of, samples_of
from trainer.data.batches import micro_batches
from trainer.data.stream.mix import Stage
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.data.stream.shards import DatasetWriter, Tokenizer

TOKENIZER = Tokenizer(sha256="0" * 64, vocabulary=60_000, eos=0)
SOURCES = ((90, 700), (50, 900), (25, 400), (8, 10_000))
"""Documents, bytes of a shard."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four datasets in which no token comes twice; documents of 0 to 79 tokens."""
    root, token = tmp_path_factory.mktemp("oracle"), 1
    for source, (count, shard_bytes) in enumerate(SOURCES):
        rng = np.random.default_rng(source)
        writer = DatasetWriter(root / str(source), TOKENIZER, shard_bytes=shard_bytes)
        for _ in range(count):
            length = int(rng.integers(0, 80))
            writer.add(np.arange(token, token + length))
            token += length
        writer.finish()
    assert token < TOKENIZER.vocabulary
    return [root / str(source) for source in range(len(SOURCES))]


@pytest.fixture(autouse=True, scope="module")
def _short_segments() -> Iterator[None]:
    """So that a chain crosses many of their edges, and none places more samples than it reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.stream.reader.SEGMENT", 64)
        yield


def opened(folders: list[Path], rules: Rules, plans: Path | None, max_epochs: float = 10**6) -> Stream:
    chosen = StreamSettings(
        rules.length,
        rules.packing,
        rules.isolate,
        rules.seed,
        rules.window,
        max_epochs,  # type: ignore[arg-type]
    )
    return Stream(
        folders, chosen, stages=[Stage(start, tuple(weights)) for start, weights in rules.stages], plan_folder=plans
    )


def digest(batch: dict[str, Any]) -> str:
    """Of every number that a model sees."""
    names = [name for name in ("input_ids", "labels", "position_ids") if name in batch]
    content = b"".join(name.encode() + np.asarray(batch[name], np.int64).tobytes() for name in names)
    return hashlib.sha256(content).hexdigest()


@st.composite
def rules_of(draw: st.DrawFn, most_sources: int = len(SOURCES)) -> Rules:
    sources = draw(st.integers(1, most_sources))
    weights = st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5]), min_size=sources, max_size=sources).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 60), max_size=2)))
    return Rules(
        length=draw(st.sampled_from([16, 32, 50])),
        packing=draw(st.sampled_from(["concat", "best_fit"])),
        isolate=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
        window=draw(st.integers(1, 4)),
        stages=[(start, draw(weights)) for start in [0, *starts]],
    )


LINKS = st.lists(st.tuples(st.integers(1, 4), st.none() | st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4)
"""(world size, micro-batch size, steps until the stop)."""


@settings(max_examples=30, deadline=None)
@given(rules=rules_of(), links=LINKS, batch_size=st.integers(4, 12), is_kept=st.booleans())
def test_any_chain_of_topologies_reads_the_global_batches_of_the_oracle(
    rules: Rules, links: list[Any], batch_size: int, is_kept: bool, folders: list[Path]
) -> None:
    used = folders[: len(rules.stages[0][1])]
    num_steps = sum(steps for _, _, steps in links)
    samples = samples_of(used, rules, num_steps * batch_size)
    step = 0
    for world_size, micro, steps in links:
        ranks = [opened(used, rules, folders[0].parent / "plans" if is_kept else None) for _ in range(world_size)]
        for _ in range(steps):
            ids = np.arange(step * batch_size, (step + 1) * batch_size)
            parts = [
                one.batch(part.tolist())
                for rank, one in enumerate(ranks)
                for part in micro_batches(ids, rank, world_size, micro)
            ]
            together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            expected = samples[step * batch_size : (step + 1) * batch_size]
            assert digest(together) == digest({name: [one[name] for one in expected] for name in expected[0]})
            step += 1


@settings(max_examples=10, deadline=None)
@given(rules=rules_of(most_sources=1), epoch=st.integers(0, 2))
def test_every_pass_holds_every_token_once_and_whole_documents_where_they_fit(
    rules: Rules, epoch: int, folders: list[Path]
) -> None:
    for folder in folders:
        stream = opened([folder], Rules(**vars(rules) | {"stages": [(0, [1.0])]}), None)
        rows = stream.rows[0]
        batch = stream.batch(range(epoch * rows, (epoch + 1) * rows), document_ids=True)
        seen = Counter(batch["input_ids"][batch["document_ids"] >= 0].tolist())
        documents = [document for shard in documents_of(folder) for document in shard if document]
        lost = {token for document in documents for token in document} - seen.keys()
        assert set(seen.values()) == {1}
        if rules.packing == "concat":
            assert len(lost) < rules.length * len(documents_of(folder))  # less than a row of each shard
            continue
        assert not lost
        rows_held = [set(row.tolist()) for row in batch["input_ids"]]
        for document in documents:
            assert len(document) > rules.length or sum(document[0] in held for held in rows_held) == 1
            assert len(document) > rules.length or any(set(document) <= held for held in rows_held)
