"""Tiny real models and data for tests: a two-layer BERT and Llama, sentences and token datasets that can be learned."""

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


def tiny_llama(folder: Path, positions: int = 128) -> Path:
    """The configuration of a two-layer Llama with grouped-query attention and tied embeddings; its weights are drawn. Returns `folder`."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=NUM_WORDS + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=NUM_WORDS,
    ).save_pretrained(folder)
    return folder


NUM_WORDS = 60


def tiny_tokens(folder: Path, documents: int = 60, seed: int = 0, shard_bytes: int = 700) -> Path:
    """A token dataset of several shards: documents of 2 to 40 words, where each word mostly follows from the one before."""
    import hashlib

    import tokenizers

    from trainer.data.stream.shards import DatasetWriter, Tokenizer

    words = {f"w{number}": number for number in range(NUM_WORDS)} | {"<end>": NUM_WORDS}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    content = made.to_str()
    known = Tokenizer(sha256=hashlib.sha256(content.encode()).hexdigest(), vocabulary=len(words), eos=NUM_WORDS)
    writer = DatasetWriter(folder, known, shard_bytes=shard_bytes)
    rng = np.random.default_rng(seed)
    for _ in range(documents):
        ids = [int(rng.integers(NUM_WORDS))]
        for _ in range(int(rng.integers(1, 40))):
            ids.append((3 * ids[-1] + 1) % NUM_WORDS if rng.random() < 0.9 else int(rng.integers(NUM_WORDS)))
        writer.add(np.array([*ids, NUM_WORDS]))
    writer.finish()
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    return folder


def tiny_t5(folder: Path, seed: int = 0) -> Path:
    """A random two-layer T5 that writes words of `tiny_sentences` from words of them, with its tokenizer. Returns `folder`."""
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = ["<pad>", "</s>", "<unk>", *GOOD, *BAD, *FILLERS]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
