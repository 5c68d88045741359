"""Models that write texts, for bench_augment.py: three small T5, as no translating or paraphrasing model comes as a package.

Each learns through recipes/summarize.py to repeat what Apertium, a translator made of rules that Debian has, wrote for some training
sentences: into Spanish; from there back; and at once what comes back by way of Catalan, which is a paraphrase. Invariant: no validation
or test sentence, and no label, is seen here. What a model writes of a sentence that it did not learn is worth nothing.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from trainer.config import Augmentation
from trainer.config.augment import MODEL_KINDS
from trainer.metrics import rouge_l
from trainer.model.rewrite import rewritten

ROOT = Path(__file__).resolve().parents[2]
LEARNED = {
    "translator": ("text", "spanish"),
    "back_translator": ("spanish", "back_translation"),
    "paraphraser": ("text", "paraphrase"),
}
"""Setting of data.augment -> the columns that its model reads and writes."""
STEPS = 2_500
VOCABULARY = 4_000
SHAPE = {"d_model": 128, "d_ff": 384, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
"""What of recipes/models/t5-10m is made smaller: 1.5M parameters learn 1,000 sentences by heart in minutes."""
PACKAGES = "apertium-eng-spa apertium-eng-cat"


def make_writers(folder: Path, texts: Sequence[str]) -> dict[str, str]:
    """Setting of data.augment -> folder of its model, which has learned these texts. What `folder` already holds is not made again."""
    pairs = folder / "pairs.jsonl"
    if pairs.exists():
        if [row["text"] for row in read_rows(pairs)] != list(texts):
            sys.exit(f"error: --writers ({folder}) holds models that have learned other sentences; give another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        spanish, catalan = translate(texts, "eng-spa"), translate(texts, "eng-cat")
        back = {"back_translation": translate(spanish, "spa-eng"), "paraphrase": translate(catalan, "cat-eng")}
        write_rows({"text": texts, "spanish": spanish, **back}, pairs)
    for setting, (source, target) in LEARNED.items():
        learn(folder, setting, source, target)
    return {setting: str(folder / setting / "model") for setting in LEARNED}


def likeness(folder: Path, models: dict[str, str], num_texts: int) -> Iterator[str]:
    """How near the models come to their teachers, and how far from the texts that they read; of the first texts."""
    rows = read_rows(folder / "pairs.jsonl")[:num_texts]
    for kind, names in MODEL_KINDS.items():
        augment = Augmentation(kinds=(kind,), **{name: models[name] for name in names})  # type: ignore[arg-type]
        written = rewritten(kind, augment, [row["text"] for row in rows], seed=0, device="cpu")
        to_teacher = statistics.mean(rouge_l(text, row[kind]) for text, row in zip(written, rows, strict=True))
        to_text = statistics.mean(rouge_l(text, row["text"]) for text, row in zip(written, rows, strict=True))
        yield f"{kind}: ROUGE-L {to_teacher:.3f} to the teacher's text, {to_text:.3f} to the text itself"


def write_rows(columns: dict[str, Sequence[str]], file: Path) -> None:
    """JSON lines; a text that Apertium leaves empty stays as it was read."""
    rows = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        for source, target in LEARNED.values():
            row[target] = row[target].strip() or row[source]
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    file.write_text("".join(rows), encoding="utf-8")


def read_rows(file: Path) -> list[dict[str, str]]:
    """The same back."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def translate(texts: Sequence[str], pair: str) -> list[str]:
    """Each text by Apertium, words that it does not know as they are."""
    if shutil.which("apertium") is None:
        sys.exit(f"error: apertium is not installed; as root: apt-get install --no-install-recommends {PACKAGES}")
    told = "".join(f"{' '.join(text.split())}\n" for text in texts)
    command = ["apertium", "-u", "-f", "line", pair]
    written = subprocess.run(command, input=told, capture_output=True, encoding="utf-8", check=True).stdout
    lines = written.split("\n")[:-1]
    assert len(lines) == len(texts), (len(lines), len(texts))
    return lines


def learn(folder: Path, setting: str, source: str, target: str) -> None:
    """A T5 that writes the column `target` from the column `source`; a run that is finished is left as it is."""
    shape = folder / "t5"
    if not shape.exists():
        save_shape(folder / "pairs.jsonl", shape)
    settings: dict[str, object] = {
        "run_dir": folder / setting,
        "model.source": shape,
        "model.init": "random",
        "data.source": folder / "pairs.jsonl",
        "data.text": source,
        "data.target": target,
        "data.max_length": 128,
        "data.max_target_length": 128,
        "data.validation_fraction": 0.005,  # a writer that learns by heart is of no use on these, and is not chosen by them
        "data.generate": 0,
        "optim.peak_lr": 4e-3,
        "optim.weight_decay": 0.0,
        "train.max_steps": STEPS,
        "train.eval_every": STEPS,
        "train.log_every": 100,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    subprocess.run(["samestep", "run", str(ROOT / "recipes/summarize.py"), *words], check=True, stdout=sys.stderr)


def save_shape(pairs: Path, folder: Path) -> None:
    """A tokenizer of these texts, a byte-level BPE, and the configuration of a T5 for it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((text for row in read_rows(pairs) for text in row.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
    config = AutoConfig.from_pretrained(ROOT / "recipes/models/t5-10m")
    config.update({**SHAPE, "vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
