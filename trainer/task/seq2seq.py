"""A text from a text, by a model with an encoder and a decoder: summaries, translations."""

import hashlib
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import Engine
from trainer.config import PairData, RunConfig
from trainer.data.batches import GlobalBatches, Ids
from trainer.data.pairs import build_pairs
from trainer.data.tokens import require_fast
from trainer.errors import ConfigError
from trainer.metrics import exact_match, rouge_1, rouge_2, rouge_l
from trainer.model.architecture import load_architecture, load_tokenizer
from trainer.predict.generate import Decoding, generate
from trainer.screen import announce
from trainer.task.answers import Answered, answer_metrics
from trainer.task.clm import PROMPTS, LanguageTask, check_positions
from trainer.task.protocol import Batch, Evaluation, Outputs

SCORES = {"exact_match": exact_match, "rouge_1": rouge_1, "rouge_2": rouge_2, "rouge_l": rouge_l}
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


class Seq2SeqTask(LanguageTask):
    """Implements `Task`; see protocol.py."""

    shown_metrics = ("loss", "perplexity")

    def __init__(self, config: RunConfig) -> None:
        data, train = config.data, config.train
        assert isinstance(data, PairData)
        tokenizer = load_tokenizer(config.model)
        require_fast(tokenizer, config.model.source)  # others may write targets otherwise than texts
        self.settings, self.data = data, build_pairs(data, tokenizer)
        self.batches = GlobalBatches(
            self.data.train.lengths, train.global_batch_size, train.seed, group_by_length=data.group_by_length
        )
        self.padding, self.start = int(tokenizer.pad_token_id or 0), decoder_start(config)
        super().__init__(config, tokenizer, len(tokenizer), steps_per_epoch=self.batches.per_epoch)

    @property
    def num_validation_rows(self) -> int:
        return len(self.data.validation)

    def model_info(self) -> dict[str, object]:
        return {"max_length": self.settings.max_length, "prefix": self.settings.prefix}

    def usage(self, folder: Path) -> str:
        return f'samestep predict {quote(str(folder))} "your text"'

    def identity(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for part in (self.data.train.texts, self.data.train.targets):
            digest.update(part.tokens.tobytes())
            digest.update(part.offsets.tobytes())
        return {"data": digest.hexdigest()}

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def global_batch(self, step: int) -> np.ndarray:
        return self.batches.at(step)

    def training_batch(self, ids: np.ndarray) -> Batch:
        return self.data.train.batch(ids, padding=self.padding, start=self.start)

    def validation_batch(self, ids: np.ndarray) -> Batch:
        return self.data.validation.batch(ids, padding=self.padding, start=self.start)

    def rank_state(self, step: int) -> bytes:
        return b""

    def restore_rank_state(self, step: int, state: bytes) -> None:
        assert not state, "samples are a function of the step"

    def model_inputs(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in INPUTS}

    def counts(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        num_bytes, num_tokens, num_targets = super().counts(outputs, batch)
        return num_bytes, num_tokens, num_targets + batch["input_ids"].numel()

    def generation_metrics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        """stop_rate, exact_match, rouge_1, rouge_2 and rouge_l of the answers to the first held-out texts, and how many."""
        count = min(self.settings.generate, len(self.data.validation))
        return answer_metrics(lambda places: self.answered(model, places), count, SCORES, engine)

    def answered(self, model: nn.Module, places: Ids) -> list[Answered]:
        """The answer to each held-out text, and its target; white space is one space in both."""
        validation, data = self.data.validation, self.settings
        ids, mask = validation.texts.padded(places, self.padding)
        prompts = [torch.from_numpy(row[own].astype(np.int64)) for row, own in zip(ids, mask, strict=True)]
        end = self.tokenizer.eos_token_id
        how = Decoding(self.padding, () if end is None else (end,), data.new_tokens, num_beams=data.num_beams)
        texts = [
            (str(self.tokenizer.decode(written, skip_special_tokens=True)), has_stopped)
            for written, has_stopped in generate(model, prompts, how)
        ]
        wanted = [" ".join(validation.pairs[place].target.split()) for place in places]
        return [
            (" ".join(text.split()), stopped, target) for (text, stopped), target in zip(texts, wanted, strict=True)
        ]

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """samples.txt: held-out texts, what the model makes of them, and their targets."""
        pairs = self.data.validation.pairs[:PROMPTS]
        texts = [
            f"{pair.text}\n[answer] {answer}\n[target] {wanted}"
            for pair, (answer, _, wanted) in zip(pairs, self.answered(model, np.arange(len(pairs))), strict=True)
        ]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def build(config: RunConfig, accelerator: Accelerator) -> Seq2SeqTask:
    """Read, check, split and tokenize the pairs; rank 0 says what they are."""
    data = config.data
    assert isinstance(data, PairData)
    for name in ("max_length", "max_target_length", *(["new_tokens"] if data.generate else [])):
        check_positions(config, getattr(data, name), setting=f"data.{name}")
    task = Seq2SeqTask(config)
    announce(describe(task), is_main=accelerator.is_main_process)
    return task


def decoder_start(config: RunConfig) -> int:
    """The token that the decoder begins with. ConfigError for a model that does not say."""
    start = getattr(load_architecture(config.model, ()), "decoder_start_token_id", None)
    if start is None:
        raise ConfigError(
            f"model.source ({config.model.source}): its config.json names no decoder_start_token_id, with which a decoder begins; add the "
            "one that it was trained with, for T5 that of the padding token, or use a model with an encoder and a decoder"
        )
    return int(start)


def describe(task: Seq2SeqTask) -> str:
    """What the data is, for the screen before training."""
    data, found = task.settings, task.data
    texts, targets = found.described_lengths
    lines = [
        f"{data.source}: {len(found.train):,} pairs for training, {len(found.validation):,} of {found.num_held_out:,} held-out texts for "
        f"validation; {found.num_repeated:,} of their targets are also in training",
        f"texts: tokens {texts} (data.max_length)",
        f"targets: tokens {targets} (data.max_target_length)",
    ]
    return "\n".join(f"{'data' if place == 0 else '':<11}{line}" for place, line in enumerate(lines))
