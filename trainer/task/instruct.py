"""Instruction tuning: the next token of responses, given their prompts."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from trainer.config import InstructData, RunConfig
from trainer.data.batches import GlobalBatches
from trainer.data.instruct import InstructSet, build_instruct
from trainer.model.architecture import load_tokenizer
from trainer.screen import announce
from trainer.task.clm import PROMPTS, LanguageTask, check_positions
from trainer.task.protocol import Batch, Evaluation


class InstructTask(LanguageTask):
    """Implements `Task`; see protocol.py."""

    def __init__(self, config: RunConfig) -> None:
        data, train = config.data, config.train
        assert isinstance(data, InstructData)
        tokenizer = load_tokenizer(config.model)
        self.data: InstructSet = build_instruct(data, tokenizer)
        self.max_length = data.max_length
        self.batches = GlobalBatches(
            self.data.train.lengths, train.global_batch_size, train.seed, group_by_length=data.group_by_length
        )
        self.padding = int(tokenizer.pad_token_id or 0)
        super().__init__(config, tokenizer, len(tokenizer), steps_per_epoch=self.batches.per_epoch)

    @property
    def sequence_length(self) -> int:
        return self.max_length

    @property
    def num_validation_rows(self) -> int:
        return len(self.data.validation)

    def identity(self) -> str:
        digest = hashlib.sha256(self.data.train.prompt_lengths.tobytes())
        for row in self.data.train.rows:
            digest.update(row.tobytes())
        return digest.hexdigest()

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def global_batch(self, step: int) -> np.ndarray:
        return self.batches.at(step)

    def training_batch(self, ids: np.ndarray) -> Batch:
        return self.data.train.batch(ids, self.padding)

    def validation_batch(self, ids: np.ndarray) -> Batch:
        return self.data.validation.batch(ids, self.padding)

    def rank_state(self, step: int) -> bytes:
        return b""

    def restore_rank_state(self, step: int, state: bytes) -> None:
        assert not state, "samples are a function of the step"

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """samples.txt: held-out prompts and what the model answers."""
        held_out = self.data.validation
        with torch.random.fork_rng():
            torch.manual_seed(self.config.train.seed)
            prompts = [
                torch.from_numpy(held_out.rows[row][: held_out.prompt_lengths[row]])
                for row in range(min(PROMPTS, len(held_out)))
            ]
            texts = [self.continued(model, prompt) for prompt in prompts]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def build(config: RunConfig, accelerator: Accelerator) -> InstructTask:
    """Read and tokenize the pairs; rank 0 says what they are."""
    check_positions(config, config.data.max_length)  # type: ignore[union-attr]
    task = InstructTask(config)
    data = config.data
    assert isinstance(data, InstructData)
    left_out = (
        f"; {task.data.num_left_out:,} longer than {data.max_length} tokens left out" if task.data.num_left_out else ""
    )
    targets = 1 - task.data.train.prompt_lengths.sum() / (task.data.train.lengths.sum() + len(task.data.train))
    template = (
        "the model's chat template" if task.tokenizer.chat_template else "a plain template, since the model has none"
    )
    announce(
        f"data       {data.source}: {len(task.data.train):,} pairs for training, {len(task.data.validation):,} for validation{left_out}\n"
        f"           in {template}; {targets:.0%} of the tokens are targets",
        is_main=accelerator.is_main_process,
    )
    return task
