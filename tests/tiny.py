"""Tiny real models and data for tests: a two-layer BERT, Llama, T5 and BART; sentences, pairs and token datasets that can be learned."""

import csv
import json
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


def tiny_writer(folder: Path, seed: int = 0) -> Path:
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
        vocab_size=len(words),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        initializer_factor=0.3,  # so that no token is much likelier than others
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def tiny_t5(folder: Path, dropout: float = 0.0) -> Path:
    """A random T5 of two blocks in each stack, and a tokenizer of words w0 to w59 that puts no end behind a text. Returns `folder`."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    size = _words_tokenizer(folder, pad="<pad>", eos="</s>", more=[f"<extra_id_{number}>" for number in range(4)])
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def tiny_bart(folder: Path, positions: int = 64) -> Path:
    """A random BART of two blocks in each stack, whose tokenizer puts <s> and </s> around a text. Returns `folder`."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    size = _words_tokenizer(folder, pad="<pad>", eos="</s>", more=["<s>"], around=("<s>", "</s>"))
    config = BartConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=positions,
        dropout=0.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def _words_tokenizer(
    folder: Path, *, pad: str, eos: str, more: list[str], around: tuple[str, str] | None = None
) -> int:
    """A tokenizer of whole words: pad is 0, eos 1, <unk> 2, then `more`, then w0 to w59. Returns how many it knows."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [pad, eos, "<unk>", *more]
    words = {word: number for number, word in enumerate([*special, *(f"w{number}" for number in range(NUM_WORDS))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if around is not None:
        ends = [(token, words[token]) for token in around]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{around[0]} $A {around[1]}", special_tokens=ends
        )
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token=eos, unk_token="<unk>", additional_special_tokens=more
    ).save_pretrained(folder)
    return len(words)


def tiny_pairs(path: Path, rows: int = 80, seed: int = 0) -> Path:
    """JSONL with text, 1 to 12 words, and target: its first word twice and the word behind that. Returns `path`."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        words = rng.integers(NUM_WORDS, size=int(rng.integers(1, 13)))
        target = f"w{words[0]} w{words[0]} w{(words[0] + 1) % NUM_WORDS}"
        lines.append(json.dumps({"text": " ".join(f"w{word}" for word in words), "target": target}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_questions(path: Path, rows: int = 48, seed: int = 0, *, unanswerable: bool = False) -> Path:
    """JSONL rows: a context of 8 to 50 fillers with one good and one bad word, a question that asks for either. Returns `path`.

    unanswerable: every third question has no answer, and its context neither word.
    """
    rng = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        words = [str(word) for word in rng.choice(FILLERS, int(rng.integers(8, 51)))]
        asked, answers = ("good", "bad")[row % 2], {"text": [], "answer_start": []}
        if not (unanswerable and row % 3 == 0):
            for telling in (str(rng.choice(GOOD)), str(rng.choice(BAD))):
                words.insert(int(rng.integers(len(words) + 1)), telling)
            answer = next(word for word in words if word in (GOOD if asked == "good" else BAD))
            start = len(" ".join(words[: words.index(answer)])) + bool(words.index(answer))
            answers = {"text": [answer], "answer_start": [start]}
        lines.append(json.dumps({"question": f"is a {asked} story", "context": " ".join(words), "answers": answers}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_targets(path: Path, rows: int = 160, seed: int = 0) -> Path:
    """A JSONL file with columns text, labels and score. Returns `path`.

    labels: a list of those of good, bad and music whose words are in the text, empty for some; score: good words less bad ones, times 0.5.
    """
    import json

    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            words = list(rng.choice([word for word in FILLERS if word != "music"], int(rng.integers(2, 8))))
            num_good, num_bad, has_music = (int(rng.integers(most)) for most in (3, 3, 2))
            words += [*rng.choice(GOOD, num_good), *rng.choice(BAD, num_bad), *["music"] * has_music]
            found = {"good": num_good, "bad": num_bad, "music": has_music}
            row = {
                "text": " ".join(rng.permutation(words)),
                "labels": [name for name, number in found.items() if number],
                "score": 0.5 * (num_good - num_bad),
            }
            file.write(json.dumps(row) + "\n")
    return path
