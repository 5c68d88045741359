"""`asset:stdlib` as token datasets: the running Python's standard library, by a BPE that is trained on it. Made once, then kept.

Every twentieth file is held out as `asset:stdlib-validation`; the tokenizer has not seen it.
"""

import sys
from pathlib import Path

from trainer.data.assets import cache_folder, stdlib_files
from trainer.data.made import made_once
from trainer.data.stream.shards import MANIFEST
from trainer.data.stream.tokenize import tokenize

PARTS = {"asset:stdlib": "train", "asset:stdlib-validation": "validation"}
VOCABULARY, END_OF_TEXT, HOLD_OUT_EVERY = 8192, "<|endoftext|>", 20


def stdlib_dataset(source: str) -> Path:
    """The folder of one of PARTS, made at first use: 20 seconds. Any number of processes may call it. DataError for a full disk."""
    part = PARTS[source]
    name = "stdlib-tokens-{}.{}.{}".format(*sys.version_info) + f"-{VOCABULARY}"
    return made_once(name, make_datasets, is_whole=lambda folder: (folder / part / MANIFEST).exists()) / part


def make_datasets(folder: Path) -> None:
    """Train the tokenizer, and tokenize both parts."""
    print(f"samestep: tokenizing Python's standard library into {cache_folder()}, once", file=sys.stderr, flush=True)
    files = stdlib_files()
    held_out = files[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    parts = {"train": sorted(set(files) - set(held_out)), "validation": held_out}
    folder.mkdir()
    train_tokenizer(parts["train"], folder / "tokenizer.json")
    for part, documents in parts.items():
        names = [str(file) for file in documents]
        tokenize(names, folder / part, folder / "tokenizer.json", eos=END_OF_TEXT, workers=2)


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
