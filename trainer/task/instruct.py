"""Instruction tuning: the next token of answers, given the conversation before them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import Engine
from trainer.checkpoint.manifest import TEMPLATE
from trainer.config import InstructData, RunConfig
from trainer.data.batches import GlobalBatches, rank_share
from trainer.data.gate import check, statistics, stop_tokens
from trainer.data.instruct import InstructSet, Sample, build_instruct
from trainer.metrics import rouge_l
from trainer.model.architecture import load_tokenizer
from trainer.screen import announce
from trainer.task.clm import PROMPTS, LanguageTask, check_positions
from trainer.task.protocol import Batch, Evaluation

GENERATED_TOGETHER = 16
"""Prompts of one rank that are answered in one batch."""


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
        tokenizer.chat_template = self.data.format.jinja()  # what is exported says how to ask it
        super().__init__(config, tokenizer, len(tokenizer), steps_per_epoch=self.batches.per_epoch)

    @property
    def sequence_length(self) -> int:
        return self.settings.max_length

    @property
    def num_validation_rows(self) -> int:
        return len(self.data.validation)

    def model_info(self) -> dict[str, object]:
        return {**super().model_info(), "stop_token_ids": self.stop}

    def usage(self, folder: Path) -> str:
        return f'samestep predict {folder} --chat "your question"'

    def identity(self) -> str:
        digest = hashlib.sha256()
        for sample in self.data.train.samples:
            digest.update(sample.ids.tobytes())
            digest.update(sample.is_target.tobytes())
        digest.update(repr(self.data.train.rows).encode())
        return digest.hexdigest()

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
        if count:
            announce(f"answering {count} held-out prompts", is_main=engine.rank == 0)
        sums = torch.zeros(count, 3, dtype=torch.float64)
        share = rank_share(np.arange(count), engine.rank, engine.world_size)
        for start in range(0, len(share), GENERATED_TOGETHER):
            places = share[start : start + GENERATED_TOGETHER]
            samples = [self.data.validation.samples[place] for place in places]
            for place, sample, (answer, has_stopped) in zip(places, samples, self.answers(model, samples), strict=True):
                wanted = self.text(sample.ids[sample.prompt_length :])
                sums[place] = torch.tensor([has_stopped, answer == wanted, rouge_l(answer, wanted)])
        stop_rate, exact_match, rouge = (engine.sum_array_over_ranks(sums).sum(dim=0) / max(count, 1)).tolist()
        return (
            {"stop_rate": stop_rate, "exact_match": exact_match, "rouge_l": rouge, "generated": count} if count else {}
        )

    def answers(self, model: nn.Module, samples: Sequence[Sample]) -> list[tuple[str, bool]]:
        """The greedy answer to each sample's last prompt, and whether the model ended it."""
        prompts = [torch.from_numpy(sample.ids[: sample.prompt_length]) for sample in samples]
        return [
            (self.text(ids), has_stopped)
            for ids, has_stopped in generate(model, prompts, self.padding, self.stop, self.settings.new_tokens)
        ]

    def text(self, ids: Any) -> str:
        """Without special tokens and the white space around."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """samples.txt: held-out prompts and what the model answers."""
        samples = self.data.validation.samples[:PROMPTS]
        texts = [
            f"{self.tokenizer.decode(sample.ids[: sample.prompt_length])}[...]{answer}"
            for sample, (answer, _) in zip(samples, self.answers(model, samples), strict=True)
        ]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def generate(
    model: nn.Module, prompts: Sequence[Tensor], padding: int, stop: Sequence[int], new_tokens: int
) -> list[tuple[Tensor, bool]]:
    """Greedy continuations of prompts (N,) int64, up to and without what stops them, and whether something did. Local to the rank."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the right, where generation goes on
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    made = (
        cast(Any, model)
        .generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(stop),
            pad_token_id=padding,
        )[:, longest:]
        .cpu()
    )
    found = []
    for row in made:
        ends = torch.isin(row, torch.tensor(list(stop))).nonzero()
        found.append((row[: int(ends[0])], True) if len(ends) else (row, False))
    return found


def build(config: RunConfig, accelerator: Accelerator) -> InstructTask:
    """Read, tokenize and check the conversations; rank 0 says what they are."""
    check_positions(config, config.data.max_length)  # type: ignore[union-attr]
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
    if found.num_cut or found.num_left_out:
        lines.append(
            f"longer than data.max_length ({data.max_length}): {found.num_cut:,} cut behind an answer, {found.num_left_out:,} left out"
        )
    if train.is_packed:
        padding = 1 - train.lengths.sum() / (len(train) * data.max_length)
        lines.append(
            f"packed into {len(train):,} rows of at most {data.max_length} tokens, {padding:.1%} padding; conversations isolated"
        )
    lines += [f"allowed by data.allow: {words}" for words in allowed]
    return "\n".join(f"{'data' if place == 0 else '':<11}{line}" for place, line in enumerate(lines))
