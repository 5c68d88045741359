"""Causal language modelling on text that is tokenized while it is read. Its rows come in order, so it keeps a state for checkpoints."""

import hashlib
import json
from typing import Any, cast

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from trainer.config import LiveData, RunConfig
from trainer.data.batches import rank_share
from trainer.data.stream.live import LiveRows, Rows, open_dataset
from trainer.data.tokens import require_fast
from trainer.errors import CheckpointError, ConfigError
from trainer.model.architecture import load_tokenizer
from trainer.screen import announce
from trainer.task.clm import LanguageTask, check_positions, read_batch
from trainer.task.protocol import Batch

KEPT_STATES = 4
"""Of the steps read last: more than are read ahead of the one that is saved."""


class LiveTask(LanguageTask):
    """Implements `Task`; see protocol.py. Sample numbers only say how many rows of a step are this rank's."""

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        from datasets.distributed import split_dataset_by_node

        data = config.data
        assert isinstance(data, LiveData)
        assert config.train.max_steps is not None
        self.data, self.rank, self.world_size = data, rank, world_size
        tokenizer = live_tokenizer(config)
        require_fast(tokenizer, config.model.source)  # of others there is no telling how many bytes a token stands for
        dataset = open_dataset(data)
        held_out = LiveRows(dataset, tokenizer, data)
        self.validation = held_out.take(data.validation_rows)
        later = dataset.skip(held_out.num_documents)
        # By documents: dealt out by file, each rank would skip its share of so many documents in its own files.
        mine = split_dataset_by_node(later, rank, world_size, strategy="examples")
        self.rows = LiveRows(mine, tokenizer, data)
        self.next_step = 0
        self.states: dict[int, dict[str, Any]] = {}
        super().__init__(config, tokenizer, len(cast(Any, tokenizer)), steps_per_epoch=config.train.max_steps)

    def identity(self) -> dict[str, str]:
        """Of what is asked for; a stream's content is not known before it is read."""
        facts = [
            self.data.model_dump(mode="json", exclude={"validation_rows", "max_epochs"}),
            len(cast(Any, self.tokenizer)),
        ]
        return {"data": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    @property
    def num_validation_rows(self) -> int:
        return len(self.validation["labels"])

    def validation_batch(self, ids: np.ndarray) -> Batch:
        return read_batch({name: array[ids] for name, array in self.validation.items()}, self.data.sequence_length)

    def training_batch(self, ids: np.ndarray) -> Batch:
        if len(ids):
            self.go_to(int(ids[0]) // self.config.train.global_batch_size)
        return read_batch(self.take(len(ids)), self.data.sequence_length)

    def take(self, count: int) -> Rows:
        """The next rows, as the settings say whether documents see each other."""
        rows = self.rows.take(count)
        if not self.data.isolate:
            del rows["position_ids"]
        return rows

    def go_to(self, step: int) -> None:
        """Stand where `step` begins: there already or in it, some steps before, or where a state is kept."""
        if step < self.next_step - 1 and step in self.states:
            self.restore_rank_state(step, json.dumps(self.states[step]).encode())
        if step == self.next_step - 1:
            return
        self.read_past(step)
        self.states[step] = self.rows.state()
        self.states = {kept: state for kept, state in self.states.items() if kept > step - KEPT_STATES}
        self.next_step = step + 1

    def read_past(self, step: int) -> None:
        """Drop the rows of steps before `step`, which a rollback left out."""
        assert step >= self.next_step, f"step {step} was read before and is not kept"
        while self.next_step < step:
            self.rows.take(len(rank_share(self.global_batch(self.next_step), self.rank, self.world_size)))
            self.next_step += 1

    def rank_state(self, step: int) -> bytes:
        if step not in self.states:
            self.read_past(step)
        state = self.states[step] if step in self.states else self.rows.state()
        return json.dumps({"world_size": self.world_size, **state}).encode()

    def restore_rank_state(self, step: int, state: bytes) -> None:
        content = json.loads(state)
        if content.pop("world_size", self.world_size) != self.world_size:
            raise CheckpointError("a live stream goes on only on the number of ranks that saved it")
        self.rows.restore(content)
        self.next_step, self.states = step, {}


def live_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """That of model.source. ConfigError for one without an end-of-text token."""
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.source ({config.model.source}): its tokenizer has no end-of-text token to end documents with"
        )
    return tokenizer


def build(config: RunConfig, accelerator: Accelerator) -> LiveTask:
    """Open the stream on every rank, set the first rows aside for validation, and say so."""
    task = LiveTask(config, accelerator.process_index, accelerator.num_processes)
    check_positions(config, task.data.sequence_length)
    words = (
        f"data       {task.data.source}, tokenized while it is read by each of {accelerator.num_processes} rank(s)\n"
        f"           validation: its first {task.num_validation_rows} rows; rows of {task.data.sequence_length} tokens, in its own order"
    )
    announce(words, is_main=accelerator.is_main_process)
    return task
