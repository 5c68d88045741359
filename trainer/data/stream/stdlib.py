"""`asset:stdlib` as token datasets: the running Python's standard library, by a BPE that is trained on it. Made once, then kept.

Every twentieth file is held out as `asset:stdlib-validation`; the tokenizer has not seen it.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from trainer.data.assets import cache_folder, stdlib_files
from trainer.data.stream.shards import MANIFEST
from trainer.data.stream.tokenize import tokenize
from trainer.errors import DataError

PARTS = {"asset:stdlib": "train", "asset:stdlib-validation": "validation"}
VOCABULARY, END_OF_TEXT, HOLD_OUT_EVERY = 8192, "<|endoftext|>", 20


def stdlib_dataset(source: str) -> Path:
    """The folder of one of PARTS, made at first use: 20 seconds. Any number of processes may call it. DataError for a full disk."""
    cache = cache_folder()
    folder = (
        cache / f"stdlib-tokens-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}-{VOCABULARY}"
    )
    found = folder / PARTS[source]
    if (found / MANIFEST).exists():
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".stdlib-tokens.lock"):
            if not (found / MANIFEST).exists():
                make_datasets(folder)
    except OSError as error:
        raise DataError(f"{error.filename or cache} cannot be written: {error.strerror}; set SAMESTEP_CACHE") from None
    return found


def make_datasets(folder: Path) -> None:
    """Train the tokenizer, tokenize both parts, publish the folder whole."""
    print(f"samestep: tokenizing Python's standard library into {folder}, once", file=sys.stderr, flush=True)
    files = stdlib_files()
    held_out = files[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    parts = {"train": sorted(set(files) - set(held_out)), "validation": held_out}
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        train_tokenizer(parts["train"], staging / "tokenizer.json")
        for part, documents in parts.items():
            tokenize(
                [str(file) for file in documents],
                staging / part,
                staging / "tokenizer.json",
                eos=END_OF_TEXT,
                workers=2,
            )
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def train_tokenizer(files: list[Path], target: Path) -> None:
    """A byte-level BPE as GPT-2's, of VOCABULARY tokens."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(file) for file in files], trainer)
    made.save(str(target))
