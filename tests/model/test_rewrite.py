"""Texts that models write: kept in a file, the same for the same seed, refused with a reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.tiny import tiny_bert, tiny_writer
from trainer.config import Augmentation
from trainer.data.samples import Samples
from trainer.errors import ConfigError
from trainer.model.rewrite import build_augmenter, model_digest, write_texts
from trainer.run_folder import INFO_FILE

TEXTS = [f"the film is a {word} story" for word in ("good", "bad", "dull", "fine")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writers")
    for seed in range(3):
        tiny_writer(folder / f"t5-{seed}", seed)
    tiny_bert(folder / "bert")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rewrites"


def samples(pairs: bool = False) -> Samples:
    return Samples(TEXTS, TEXTS[::-1] if pairs else None, np.array([1, 0, 0, 1]))


def written_by(model: Path, texts: list[str], seed: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return write_texts(AutoModelForSeq2SeqLM.from_pretrained(model).eval(), tokenizer, texts, seed=seed)


def test_a_paraphrase_is_what_the_model_writes_and_is_kept(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    augment = Augmentation(kinds=("paraphrase",), probability=1, paraphraser=str(folder / "t5-0"))
    first = build_augmenter(augment, samples(), seed=3)
    assert [first.texts_at(0, n)[0] for n in range(4)] == written_by(folder / "t5-0", TEXTS, 3) != TEXTS
    assert "writes 4 texts (data.augment.paraphraser)" in capsys.readouterr().err
    assert len(list(cache.glob("*.json"))) == 1
    again = build_augmenter(augment, samples(), seed=3)
    assert again.rewrites == first.rewrites and again.digest() == first.digest()
    assert capsys.readouterr().err == ""
    other = build_augmenter(augment, samples(), seed=4)
    assert other.rewrites != first.rewrites


def test_back_translation_reads_what_the_translator_wrote(folder: Path, cache: Path) -> None:
    augment = Augmentation(
        kinds=("back_translation",), translator=str(folder / "t5-1"), back_translator=str(folder / "t5-2")
    )
    made = build_augmenter(augment, samples(pairs=True), seed=0)
    for part, texts in enumerate((TEXTS, TEXTS[::-1])):
        expected = written_by(folder / "t5-2", written_by(folder / "t5-1", texts, 0), 0)
        assert [texts[part] for texts in made.rewrites["back_translation"]] == expected
        assert expected != texts


def test_writing_leaves_torchs_generator_alone_and_no_text_empty(folder: Path) -> None:
    before = torch.get_rng_state()
    written = written_by(folder / "t5-0", ["film"] * 40, 0)
    assert all(written) and len(set(written)) > 30
    assert torch.equal(torch.get_rng_state(), before)


class Reader:
    """In place of a model: keeps what it reads, and writes nothing."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def to(self, _: object) -> "Reader":
        return self

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: object) -> torch.Tensor:
        self.read += [row[mask].tolist() for row, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        return torch.zeros(len(input_ids), 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("trained", "asked", "read"),
    [("good ", None, "good "), ("good ", "bad ", "bad "), ("good ", "", ""), (None, None, ""), (None, "bad ", "bad ")],
)
def test_a_model_reads_before_a_text_what_is_asked_or_what_it_was_trained_with(
    trained: str | None, asked: str | None, read: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reader = tiny_writer(tmp_path / "t5"), Reader()
    (model / INFO_FILE).write_text(json.dumps({"task": "seq2seq", "prefix": trained}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    monkeypatch.setattr("trainer.model.rewrite._open", lambda setting, source: (reader, tokenizer))
    augment = Augmentation(kinds=("paraphrase",), paraphraser=str(model), paraphraser_prefix=asked)
    made = build_augmenter(augment, samples(), seed=0)
    assert reader.read == [tokenizer(read + text)["input_ids"] for text in TEXTS]
    assert made.rewrites["paraphrase"] == [(text,) for text in TEXTS]  # without the prefix, as nothing was written
    build_augmenter(augment.model_copy(update={"paraphraser_prefix": "fine "}), samples(), seed=0)
    assert len(reader.read) == 2 * len(TEXTS)


def test_a_text_ends_as_in_training_where_the_tokenizer_leaves_the_end_out(tmp_path: Path) -> None:
    model, reader = tiny_writer(tmp_path / "t5"), Reader()
    with_end = AutoTokenizer.from_pretrained(model)(TEXTS)["input_ids"]
    file = model / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    write_texts(reader, tokenizer, TEXTS, seed=0)  # type: ignore[arg-type]
    assert reader.read == with_end == [[*tokenizer(text)["input_ids"], 1] for text in TEXTS]


def test_a_model_is_known_by_the_content_of_its_files(folder: Path, tmp_path: Path) -> None:
    assert model_digest(str(folder / "t5-0")) == model_digest(str(tiny_writer(tmp_path / "copy", 0)))
    assert model_digest(str(folder / "t5-0")) != model_digest(str(folder / "t5-1"))


def test_models_that_cannot_write_are_refused(folder: Path, tmp_path: Path) -> None:
    bert = Augmentation(kinds=("paraphrase",), paraphraser=str(folder / "bert"))
    with pytest.raises(ConfigError, match=r"data\.augment\.paraphraser \(.*bert\) is a bert, which does not write"):
        build_augmenter(bert, samples(), seed=0)
    none = Augmentation(kinds=("paraphrase",), paraphraser=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"data\.augment\.paraphraser \(.*none\) cannot be opened"):
        build_augmenter(none, samples(), seed=0)
