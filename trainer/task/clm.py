"""Causal language modelling: the next token of packed rows, from token datasets that are read by sample number."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.backend import Engine
from trainer.config import LiveData, RunConfig, StreamData
from trainer.data.batches import IGNORED, rank_share
from trainer.data.objectives.vocabulary import is_byte_level
from trainer.data.stream.open import Streams, open_streams
from trainer.errors import ConfigError, DataError
from trainer.evaluate import texts_of_ranks
from trainer.loss import token_losses
from trainer.model.architecture import load_architecture
from trainer.model.vocabulary import check_next_tokens
from trainer.screen import announce
from trainer.task.protocol import Batch, Evaluation, Forward, Outputs, SplitName

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 96
"""Of the samples that are generated at the end."""


class LanguageTask(ABC):
    """What tasks on rows of tokens share: all of `Task` (protocol.py) but where rows come from."""

    label_names = ()
    count_names: tuple[str, ...] = ("bytes", "tokens", "positions")
    shown_metrics: tuple[str, ...] = ("loss", "perplexity", "bits_per_byte")
    counted, speed = "targets", "tokens_per_s"
    report_split: SplitName = "validation"

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, steps_per_epoch: int
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.vocab_size, self.steps_per_epoch = vocab_size, steps_per_epoch
        self.token_bytes = torch.from_numpy(bytes_of_tokens(tokenizer, vocab_size))

    @property
    def special_ids(self) -> Mapping[str, int]:
        """None: the configuration of the model says them."""
        return {}

    @property
    @abstractmethod
    def num_validation_rows(self) -> int:
        """Rows of an evaluation."""

    @abstractmethod
    def validation_batch(self, ids: np.ndarray) -> Batch:
        """Like `training_batch`, of held-out rows."""

    @property
    def sequence_length(self) -> int:
        """Most tokens of a row."""
        data = self.config.data
        assert isinstance(data, StreamData | LiveData)
        return data.sequence_length

    def model_info(self) -> dict[str, object]:
        return {"sequence_length": self.sequence_length}

    def usage(self, folder: Path) -> str:
        call = f'pipeline("text-generation", {json.dumps(str(folder / "model"), ensure_ascii=False)})("your text")'
        return f"python -c {quote(f'from transformers import pipeline; print({call})')}"

    def global_batch(self, step: int) -> np.ndarray:
        size = self.config.train.global_batch_size
        return np.arange(step * size, (step + 1) * size)

    def model_inputs(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        return token_losses(outputs.logits, batch["labels"]).sum()

    def counts(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        num_bytes = self.target_bytes(batch["labels"]).sum()
        return num_bytes, batch["num_tokens"].sum(), torch.tensor(float(batch["labels"].numel()))

    def target_bytes(self, labels: Tensor) -> Tensor:
        """(B, T) bytes of text of each target, 0 elsewhere."""
        table = self.token_bytes.to(labels.device)
        return torch.where(labels == IGNORED, 0, table[labels.clamp(min=0)])

    def train_metrics(
        self, loss: float, num_targets: float, counts: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        return {
            "train/bits_per_byte": bits_per_byte(loss * num_targets, counts["bytes"]),
            "train/padding": 1 - counts["tokens"] / max(counts["positions"], 1),
            "tokens_per_s": counts["tokens"] / seconds,
        }

    def evaluate(self, forward: Forward, engine: Engine, split: SplitName) -> Evaluation:
        sums: Tensor | None = None
        together = self.config.train.eval_batch_size * engine.world_size
        with torch.no_grad():
            for start in range(0, self.num_validation_rows, together):
                ids = np.arange(start, min(start + together, self.num_validation_rows))
                share = rank_share(ids, engine.rank, engine.world_size)
                batch = engine.to_device(self.validation_batch_of_all(share, engine))
                rows = self.row_sums(forward(self.model_inputs(batch)), batch).cpu()
                if sums is None:
                    sums = torch.zeros(self.num_validation_rows, rows.shape[1], dtype=torch.float64)
                sums[torch.from_numpy(share)] = rows[: len(share)]
        assert sums is not None, "there are held-out rows"
        return Evaluation(self.metrics_of(engine.sum_array_over_ranks(sums)))

    def validation_batch_of_all(self, ids: np.ndarray, engine: Engine) -> Batch:
        """This rank's batch; a DataError of one rank is raised on all, before any of them waits in a forward pass. Collective."""
        batch: Batch = {}
        problem = ""
        try:
            batch = self.validation_batch(ids)
        except DataError as error:
            problem = f"{error} (found by rank {engine.rank})" if engine.world_size > 1 else str(error)
        if engine.sum_over_ranks([float(bool(problem))])[0]:
            raise DataError(next(filter(None, texts_of_ranks(problem, engine))))
        return batch

    def row_sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        """(B, K) fp64 what an evaluation adds up of each row: here loss, targets and their bytes."""
        labels = batch["labels"]
        columns = (token_losses(outputs.logits, labels), labels != IGNORED, self.target_bytes(labels))
        return torch.stack([column.double().sum(dim=1) for column in columns], dim=1)

    def metrics_of(self, sums: Tensor) -> dict[str, float]:
        """Metrics of a split from the sums of its rows, (N, K)."""
        loss, targets, num_bytes = sums.sum(dim=0).tolist()
        return language_metrics(loss, targets, num_bytes)

    def generation_metrics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        return {}

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        starts = self.validation_batch(np.arange(min(PROMPTS, self.num_validation_rows)))
        with torch.random.fork_rng():
            torch.manual_seed(self.config.train.seed)
            texts = [self.continued(model, row[:PROMPT_TOKENS]) for row in starts["input_ids"]]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")

    def continued(self, model: nn.Module, prompt: Tensor) -> str:
        """A prompt, a mark, and what the model writes after it."""
        device = next(model.parameters()).device
        length = min(NEW_TOKENS, self.sequence_length - len(prompt))
        made = cast(Any, model).generate(
            prompt[None].to(device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=device),
            max_new_tokens=max(length, 1),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            use_cache=True,
            pad_token_id=self.tokenizer.eos_token_id,
        )[0]
        return f"{self.tokenizer.decode(prompt)}[...]{self.tokenizer.decode(made[len(prompt) :])}"


class ClmTask(LanguageTask):
    """Rows of token datasets, each a function of its number."""

    def __init__(self, config: RunConfig, streams: Streams) -> None:
        self.streams = streams
        vocab_size = streams.train.tokenizer.vocabulary
        super().__init__(config, load_data_tokenizer(streams), vocab_size, steps_per_epoch=streams.steps_per_epoch)

    def identity(self) -> dict[str, str]:
        data = self.config.data
        assert isinstance(data, StreamData)
        train, validation = self.streams.train, self.streams.validation
        ids = {f"data.sources[{n}]": source.catalog.dataset_id for n, source in enumerate(train.sources)}
        return {"data": train.identity, **ids, "data.validation": validation.sources[0].catalog.dataset_id}

    def tokenizer_files(self) -> dict[str, bytes]:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.tokenizer.eos_token}
        return {
            "tokenizer.json": self.streams.tokenizer_file.read_bytes(),
            "tokenizer_config.json": json.dumps(settings | {"pad_token": self.tokenizer.pad_token}).encode(),
        }

    @property
    def num_validation_rows(self) -> int:
        return self.streams.validation_rows

    def training_batch(self, ids: np.ndarray) -> Batch:
        return read_batch(self.streams.train.batch(ids.tolist()), self.sequence_length)

    def validation_batch(self, ids: np.ndarray) -> Batch:
        samples = self.streams.validation_samples(ids).tolist()
        return read_batch(self.streams.validation.batch(samples, scattered=True), self.sequence_length)

    def rank_state(self, step: int) -> bytes:
        return b""

    def restore_rank_state(self, step: int, state: bytes) -> None:
        assert not state, "rows are a function of their number"


def build(config: RunConfig, accelerator: Accelerator) -> ClmTask:
    """Open the datasets and say what they are; nothing is read yet but manifests, document ends and plans."""
    task = ClmTask(config, open_streams(config))
    check_next_tokens(config.model, task.streams.tokenizer_file)
    check_positions(config, task.sequence_length)
    announce(describe(config, task.streams), is_main=accelerator.is_main_process)
    return task


def check_positions(config: RunConfig, sequence_length: int, *, setting: str = "data.sequence_length") -> None:
    """ConfigError for rows that are longer than the model's positions. setting: where their length stands."""
    positions = getattr(load_architecture(config.model, ()), "max_position_embeddings", None)
    virtual = getattr(config.method, "num_virtual_tokens", 0)
    if positions is not None and 0 < positions < sequence_length + virtual:  # XLNet says -1: it has no limit
        less = f" less method.num_virtual_tokens ({virtual})" if virtual else ""
        raise ConfigError(
            f"{setting} ({sequence_length}) must be at most {positions - virtual}, the positions of model.source "
            f"({config.model.source}){less}; lower it, or take a model for longer rows"
        )


def read_batch(rows: dict[str, NDArray[np.int64]], sequence_length: int) -> Batch:
    """CPU tensors of rows: input_ids, labels, position_ids (where documents are isolated), (B, T) int64; num_tokens (B,) int64.

    Without a row: one of token 0 without targets.
    """
    num_tokens = rows.pop("num_tokens")
    if not len(num_tokens):
        rows = {name: np.full((1, sequence_length), IGNORED if name == "labels" else 0) for name in rows}
    batch = {name: torch.from_numpy(array) for name, array in rows.items()}
    return batch | {"num_tokens": torch.from_numpy(num_tokens)}


def language_metrics(loss_sum: float, num_targets: float, num_bytes: float) -> dict[str, float]:
    """Nats per target, perplexity, bits per byte of text, and how many targets."""
    loss = loss_sum / max(num_targets, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte(loss_sum, num_bytes),
        "count": int(num_targets),
    }


def bits_per_byte(loss_sum: float, num_bytes: float) -> float:
    """Nats over so many bytes of text, as bits for each: comparable between tokenizers."""
    return loss_sum / math.log(2) / max(num_bytes, 1)


def load_data_tokenizer(streams: Streams) -> PreTrainedTokenizerBase:
    """The datasets' tokenizer; it pads with its end-of-text token, and so does generation."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(streams.tokenizer_file))
    eos = streams.train.tokenizer.eos
    if eos is not None:
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos)
    return tokenizer


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> np.ndarray:
    """(V,) bytes of text that each token stands for; special tokens stand for none.

    Byte-level tokens have one character a byte; SentencePiece writes a space as U+2581 and single bytes as <0xNN>.
    """
    by_bytes = is_byte_level(tokenizer)
    special = set(tokenizer.all_special_ids)
    sizes = np.zeros(vocabulary, np.float64)
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(vocabulary)))):
        if token is None or number in special:
            continue
        is_byte = len(token) == 6 and token.startswith("<0x")
        plain = token.removeprefix("##").replace("\u2581", " ")
        sizes[number] = len(token) if by_bytes else 1 if is_byte else len(plain.encode())
    return sizes


def describe(config: RunConfig, streams: Streams) -> str:
    """What the data is, for the screen before training."""
    data, lines = config.data, []
    assert isinstance(data, StreamData)
    total = sum(streams.train.mixture.shares[0])
    for number, (name, source) in enumerate(zip(data.sources, streams.train.sources, strict=True)):
        share = float(streams.train.mixture.shares[0][number] / total)
        tokens = f"{source.catalog.num_tokens:,} tokens in {len(source.catalog.tokens)} shard(s)"
        lines.append(f"{name}, {tokens}, {source.num_rows:,} rows, weight {share:.1%}")
    held_out = f"validation: {data.validation}, {streams.validation_rows:,} of {sum(streams.validation.rows):,} rows"
    isolated = "documents isolated" if data.isolate else "documents see each other"
    rows = f"rows of {data.sequence_length} tokens, {data.packing}, {isolated}; tokenizer of {streams.train.tokenizer.vocabulary:,}"
    return "\n".join(f"{'data' if place == 0 else '':<11}{line}" for place, line in enumerate([*lines, held_out, rows]))
