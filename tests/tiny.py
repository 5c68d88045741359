"""Tiny real models and data for tests: a two-layer BERT with its tokenizer as a Hugging Face folder, and sentences that can be learned."""

import csv
from pathlib import Path

import numpy as np

GOOD = ["good", "great", "fine", "lovely", "superb"]
BAD = ["bad", "awful", "poor", "dull", "clumsy"]
FILLERS = ["the", "film", "is", "a", "story", "with", "actors", "and", "music", "very", "long", "short"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_bert(folder: Path, hidden_size: int = 32) -> Path:
    """A random two-layer BertModel and its WordPiece tokenizer, saved as `from_pretrained` reads them. Returns `folder`."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL, *GOOD, *BAD, *FILLERS]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, model_max_length=128)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def tiny_sentences(path: Path, rows: int = 64, seed: int = 0) -> Path:
    """A CSV with columns text and label (negative, positive): one telling word among 2 to 12 fillers. Returns `path`."""
    rng = np.random.default_rng(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["text", "label"])
        for row in range(rows):
            words = list(rng.choice(FILLERS, int(rng.integers(2, 13))))
            words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(GOOD if row % 2 else BAD)))
            writer.writerow([" ".join(words), "positive" if row % 2 else "negative"])
    return path
