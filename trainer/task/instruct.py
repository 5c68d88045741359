"""Instruction tuning: the next token of answers, given the conversation before them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from trainer.backend import Engine
from trainer.checkpoint.manifest import TEMPLATE
from trainer.config import InstructData, RunConfig
from trainer.data.batches import GlobalBatches, Ids
from trainer.data.gate import check, statistics, stop_tokens
from trainer.data.instruct import InstructSet, Sample, build_instruct
from trainer.data.jinja import with_system
from trainer.metrics import exact_match, rouge_l
from trainer.model.architecture import load_tokenizer
from trainer.predict.generate import Decoding, Written, generate
from trainer.screen import announce
from trainer.task.answers import Answered, answer_metrics
from trainer.task.clm import PROMPTS, LanguageTask, check_positions
from trainer.task.protocol import Batch, Evaluation


class InstructTask(LanguageTask):
    """Implements `Task`; see protocol.py."""

    def __init__(self, config: RunConfig) -> None:
        data, train = config.data, config.train
        assert isinstance(data, InstructData)
        tokenizer = load_tokenizer(config.model)
        self.settings, self.data = data, build_instruct(data, tokenizer)
        self.allowed = check(self.data, data, tokenizer)
        self.stop = sorted(stop_tokens(tokenizer, self.data))
        self.batches = GlobalBatches(
            self.data.train.lengths, train.global_batch_size, train.seed, group_by_length=data.group_by_length
        )
        self.padding = int(tokenizer.pad_token_id or 0)
        tokenizer.chat_template = with_system(
            self.data.format.jinja(), data.system
        )  # what is exported says how to ask it
        super().__init__(config, tokenizer, len(tokenizer), steps_per_epoch=self.batches.per_epoch)

    @property
    def sequence_length(self) -> int:
        return self.settings.max_length

    @property
    def num_validation_rows(self) -> int:
        return len(self.data.validation)

    def model_info(self) -> dict[str, object]:
        before = self.data.format.messages(self.data.before)
        return {**super().model_info(), "stop_token_ids": self.stop, "turns_before": before}

    def usage(self, folder: Path) -> str:
        return f'samestep predict {quote(str(folder))} --chat "your question"'

    def identity(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for sample in self.data.train.samples:
            digest.update(sample.ids.tobytes())
            digest.update(sample.is_target.tobytes())
        digest.update(repr(self.data.train.rows).encode())
        return {"data": digest.hexdigest()}

    def tokenizer_files(self) -> dict[str, bytes]:
        return {TEMPLATE: str(self.tokenizer.chat_template).encode()}

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

    def generation_metrics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        """stop_rate, exact_match and rouge_l of greedy answers to the first held-out prompts, and how many."""
        count = min(self.settings.generate, len(self.data.validation))
        scores = {"exact_match": exact_match, "rouge_l": rouge_l}
        return answer_metrics(lambda places: self.answered(model, places), count, scores, engine)

    def answered(self, model: nn.Module, places: Ids) -> list[Answered]:
        """The greedy answer to each sample's last prompt, and the answer that it has; no longer than the model's positions."""
        samples = [self.data.validation.samples[place] for place in places]
        rooms = [self.room(model, sample) for sample in samples]
        written: dict[int, Written] = {}
        for room in set(rooms):
            numbers = [number for number, its_room in enumerate(rooms) if its_room == room]
            prompts = [torch.from_numpy(samples[number].ids[: samples[number].prompt_length]) for number in numbers]
            found = generate(model, prompts, Decoding(self.padding, self.stop, room))
            written |= dict(zip(numbers, found, strict=True))
        return [
            (self.text(written[number][0]), written[number][1], self.text(sample.ids[sample.prompt_length :]))
            for number, sample in enumerate(samples)
        ]

    def room(self, model: nn.Module, sample: Sample) -> int:
        """How many tokens may follow the sample's prompt: data.new_tokens, or what is left of the model's positions."""
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is None or positions <= 0:
            return self.settings.new_tokens
        virtual = getattr(self.config.method, "num_virtual_tokens", 0)
        return min(self.settings.new_tokens, int(positions) - virtual - sample.prompt_length)

    def text(self, ids: Any) -> str:
        """Without special tokens and the white space around."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """samples.txt: held-out prompts and what the model answers."""
        samples = self.data.validation.samples[:PROMPTS]
        texts = [
            f"{self.tokenizer.decode(sample.ids[: sample.prompt_length])}[...]{answer}"
            for sample, (answer, *_) in zip(samples, self.answered(model, np.arange(len(samples))), strict=True)
        ]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def build(config: RunConfig, accelerator: Accelerator) -> InstructTask:
    """Read, tokenize and check the conversations; rank 0 says what they are."""
    check_positions(config, config.data.max_length, setting="data.max_length")  # type: ignore[union-attr]
    task = InstructTask(config)
    announce(describe(task.settings, task.data, task.allowed), is_main=accelerator.is_main_process)
    return task


def describe(data: InstructData, found: InstructSet, allowed: Sequence[str]) -> str:
    """What the data is, for the screen before training."""
    train, held_out = found.train, found.validation
    facts = statistics(train.samples)
    lines = [
        f"{data.source}: {len(train.samples):,} conversations ({found.source_format}) for training, {len(held_out):,} for validation",
        f"template {found.format.name}; {facts['tokens']:,.0f} tokens, {facts['targets'] / facts['tokens']:.0%} of them targets",
    ]
    if found.cut or found.left_out:
        lines.append(
            f"longer than data.max_length ({data.max_length}): {len(found.cut):,} cut behind an answer, {len(found.left_out):,} left out"
        )
    if train.is_packed:
        padding = 1 - train.lengths.sum() / (len(train) * data.max_length)
        lines.append(
            f"packed into {len(train):,} rows of at most {data.max_length} tokens, {padding:.1%} padding; conversations isolated"
        )
    lines += [f"allowed by data.allow: {words}" for words in allowed]
    return "\n".join(f"{'data' if place == 0 else '':<11}{line}" for place, line in enumerate(lines))
