"""Training sentences rewritten by models that the user names: once before training, then kept in a file.

Above trainer/data/augment.py, which it completes. Any number of processes may ask at once: the first writes the file while the others
wait. Invariant: a file's name is a digest of the model's own files, the prefix, the seed and all texts.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from trainer.config.augment import MODEL_KINDS, Augmentation, AugmentKind
from trainer.data.assets import cache_folder
from trainer.data.augment import Augmenter
from trainer.data.pairs import encode_texts
from trainer.data.samples import Samples
from trainer.data.synonyms import load_synonyms
from trainer.errors import ConfigError, DataError
from trainer.model.architecture import LOADING_ERRORS, first_line
from trainer.run_folder import INFO_FILE, read_info

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32
"""Texts written at a time."""
LONGEST = 256
"""Tokens of a text that is read or written."""
TOP_P = 0.95
"""Tokens are drawn from the likeliest that have this probability together."""


def build_augmenter(
    augment: Augmentation, samples: Samples, seed: int, device: torch.device | str = "cpu"
) -> Augmenter:
    """What makes other forms of the training samples. Models write on `device`, at first use: minutes for a large set.

    ConfigError for a model that cannot write, DataError for a table of synonyms that cannot be read.
    """
    asks_words = {"synonyms", "insert"} & set(augment.kinds)
    synonyms = load_synonyms(augment.synonyms) if asks_words else {}
    parts = [samples.texts] if samples.pairs is None else [samples.texts, samples.pairs]
    rewrites = {}
    for kind in MODEL_KINDS:
        if kind in augment.kinds:
            written = [rewritten(kind, augment, texts, seed=seed, device=device) for texts in parts]
            rewrites[kind] = list(zip(*written, strict=True))
    return Augmenter(samples, augment, seed, synonyms, rewrites)


def check_writers(augment: Augmentation) -> None:
    """ConfigError for a model that cannot be opened or does not write texts from texts. Loads no weights."""
    for kind, settings in MODEL_KINDS.items():
        for setting in settings if kind in augment.kinds else ():
            source = getattr(augment, setting)
            try:
                config = AutoConfig.from_pretrained(source)
            except LOADING_ERRORS as error:
                raise ConfigError(_unreadable(setting, source, error)) from None
            if not config.is_encoder_decoder:
                raise ConfigError(
                    f"data.augment.{setting} ({source}) is a {config.model_type}, which does not write a text from a text; "
                    "give a T5, BART or Marian model"
                )


def rewritten(
    kind: AugmentKind, augment: Augmentation, texts: Sequence[str], *, seed: int, device: torch.device | str
) -> list[str]:
    """Each text through the models of `kind`, one after the other."""
    check_writers(augment)
    for setting in MODEL_KINDS[kind]:
        source = getattr(augment, setting)
        prefix = _prefix(getattr(augment, f"{setting}_prefix"), source)
        texts = _kept(setting, source, texts, seed=seed, device=device, prefix=prefix)
    return list(texts)


def _prefix(asked: str | None, source: str) -> str:
    """What the model reads before a text: as asked, or as samestep trained it."""
    if asked is None and (Path(source).expanduser() / INFO_FILE).is_file():
        asked = read_info(Path(source).expanduser()).get("prefix")
    return asked or ""


def model_digest(source: str) -> str:
    """Of the content of a local model's files; of a hub model its commit."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return f"{source}@{getattr(AutoConfig.from_pretrained(source), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def write_texts(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, seed: int, prefix: str = ""
) -> list[str]:
    """One text for each, drawn with `seed`; a text stays as it is where the model writes nothing. Leaves torch's generators alone.

    The model reads `prefix` and a text, with the end of sequence behind it, as trainer/data/pairs.py trains it.
    """
    device, written = model.device, []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for start in range(0, len(texts), BATCH):
            torch.manual_seed(seed + start)
            some = list(texts[start : start + BATCH])
            read = encode_texts([prefix + text for text in some], tokenizer, LONGEST).split
            ids, mask = map(torch.from_numpy, read.padded(np.arange(len(some)), tokenizer.pad_token_id))
            inputs = {"input_ids": ids.long().to(device), "attention_mask": mask.long().to(device)}
            length = min(2 * ids.shape[1] + 8, LONGEST)
            options: dict[str, Any] = {"do_sample": True, "num_beams": 1, "top_p": TOP_P, "max_new_tokens": length}
            answers = model.generate(**inputs, **options, synced_gpus=False)  # type: ignore[operator]
            decoded = tokenizer.batch_decode(answers, skip_special_tokens=True)
            written += [new.strip() or old for new, old in zip(decoded, some, strict=True)]
    return written


def _kept(
    setting: str, source: str, texts: Sequence[str], *, seed: int, device: torch.device | str, prefix: str
) -> list[str]:
    """The texts from the cache, written first where they are not there."""
    key = json.dumps([model_digest(source), prefix, seed, TOP_P, LONGEST, BATCH, list(texts)])
    folder = cache_folder() / "rewrites"
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                print(
                    f"samestep: {source} writes {len(texts):,} texts (data.augment.{setting})",
                    file=sys.stderr,
                    flush=True,
                )
                model, tokenizer = _open(setting, source)
                written = write_texts(model.to(device), tokenizer, texts, seed=seed, prefix=prefix)
                fresh = file.with_suffix(".new")
                fresh.write_text(json.dumps(written), encoding="utf-8")
                fresh.replace(file)
        return [str(text) for text in json.loads(file.read_text(encoding="utf-8"))]
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror}; set SAMESTEP_CACHE") from None


def _open(setting: str, source: str) -> tuple[Any, "PreTrainedTokenizerBase"]:
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(source)
    except LOADING_ERRORS as error:
        raise ConfigError(_unreadable(setting, source, error)) from None


def _unreadable(setting: str, source: str, error: Exception) -> str:
    return f"data.augment.{setting} ({source}) cannot be opened ({first_line(error)}); give the folder of a saved model, or a hub id"
