"""Words of a domain as tokens: proposed from a text, added, trained, saved, exported; and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from launch.cli import main
from tests.distributed.resume_runs import start
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend import build_accelerator
from trainer.checkpoint.export import export_checkpoint
from trainer.config import ClassificationData, LoraConfig, ModelConfig, OptimConfig, RunConfig, StreamData, TrainConfig
from trainer.errors import ConfigError
from trainer.model.architecture import load_tokenizer
from trainer.model.methods import check_method
from trainer.task import build_task


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_bert(tmp_path / "model")
    tiny_sentences(tmp_path / "data.csv", rows=64)
    return tmp_path


def make_config(root: Path, tokens: Path, **changed: Any) -> RunConfig:
    return RunConfig(
        name="added",
        run_dir=root / "run",
        model=ModelConfig(source=str(root / "model"), added_tokens=tokens),
        data=ClassificationData(source=str(root / "data.csv")),
        optim=OptimConfig(peak_lr=1e-3),
        train=TrainConfig(max_steps=2, global_batch_size=8),
        **changed,
    )


def words(root: Path, *lines: str) -> Path:
    file = root / "words.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_an_added_word_is_one_token_that_is_trained_saved_and_exported(root: Path) -> None:
    """Of the two new words the data has one: its row moves away from the mean of its pieces, here [UNK]; the other's stays."""
    tokens = words(root, "longfilm", "storyteller")
    header, *lines = (root / "data.csv").read_text(encoding="utf-8").splitlines()
    (root / "data.csv").write_text("\n".join([header, *(f"longfilm {line}" for line in lines)]), encoding="utf-8")
    seen = start(make_config(root, tokens), "single", 1)
    assert seen is not None
    assert seen[0]["error"] is None
    export_checkpoint(sorted((root / "run" / "checkpoints").iterdir())[-1], root / "exported")
    for folder in (root / "run" / "model", root / "exported"):
        tokenizer, model = (
            kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForSequenceClassification)
        )
        assert tokenizer.tokenize("a longfilm by a storyteller") == ["a", "longfilm", "[UNK]", "a", "storyteller"]
        assert model.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(root / "model")) + 2
        rows = model.get_input_embeddings().weight.detach()
        assert rows.shape[0] == len(tokenizer)
        before = (
            AutoModel.from_pretrained(root / "model").get_input_embeddings().weight.detach()[tokenizer.unk_token_id]
        )
        in_data, elsewhere = rows[tokenizer.convert_tokens_to_ids(["longfilm", "storyteller"])]
        assert torch.equal(elsewhere, before)
        assert 1e-4 < float((in_data - before).abs().max()) < 1e-2  # two steps of 1e-3


def test_a_new_row_starts_as_the_mean_of_its_pieces(root: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    from trainer.model.load import grow_embeddings

    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    model = BertForMaskedLM(BertConfig.from_pretrained(root / "model"))
    old = model.get_input_embeddings().weight.detach().clone()
    grow_embeddings(model, tokenizer, ["goodfilm"])
    pieces = tokenizer(" goodfilm", add_special_tokens=False)["input_ids"]
    new = model.get_input_embeddings().weight
    assert torch.equal(new[:-1], old)
    assert torch.allclose(new[-1], old[pieces].mean(dim=0))
    assert model.get_output_embeddings().weight is new  # tied as before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "holds no token"),
        (("good",), "the tokenizer has good already"),
        (("newword", "newword"), r"words.txt:2\): 'newword' stands there twice"),
        (("two words",), "has a space in it"),
    ],
)
def test_a_file_that_will_not_do_is_refused(root: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(ModelConfig(source=str(root / "model"), added_tokens=words(root, *lines)))


def test_a_file_that_is_missing_or_not_utf8_is_refused(root: Path) -> None:
    file = root / "latin.txt"
    for content in (None, "caf\xe9".encode("latin-1")):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_tokenizer(ModelConfig(source=str(root / "model"), added_tokens=file))


def test_methods_that_freeze_the_embeddings_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs method\.name=full, not lora"):
        check_method(make_config(root, words(root, "newword"), method=LoraConfig()))


def test_words_that_cost_most_are_proposed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = root / "text.txt"
    text.write_text("Tokenizers cut tokenizers; the film cut 12 3d films.", encoding="utf-8")
    run_data("vocabulary", str(text), "--tokenizer", "asset:minilm", "--add", "1", "--output", str(root / "out.txt"))
    said = capsys.readouterr().out
    assert (root / "out.txt").read_text() == "tokenizers\n"
    assert "7 words, 5 of them different: 1.571 subwords per word, 71.4% kept whole" in said
    assert "with 1 tokens more: 1.000 subwords per word" in said


def test_a_proposed_word_saves_what_is_said_with_a_byte_level_tokenizer(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The space before a token of one's own is one more there; a word that is a token without the space is none to propose."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text, out, made = root / "bytes.txt", root / "bytes-words.txt", Tokenizer(models.BPE())
    text.write_text("a zebra saw a zebra zap a yak\n" * 9, encoding="utf-8")
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["saw saw", "\nyak\nyak"] * 9, trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="!").save_pretrained(root / "bytes")
    (root / "bytes" / "config.json").write_text('{"model_type": "gpt2"}')
    run_data("vocabulary", str(text), "--tokenizer", str(root / "bytes"), "--output", str(out))
    said = capsys.readouterr().out
    before = load_tokenizer(ModelConfig(source=str(root / "bytes")))
    after = load_tokenizer(ModelConfig(source=str(root / "bytes"), added_tokens=out))
    assert out.read_text().split() == ["zebra", "zap"] and "yak" in before.get_vocab()
    found = re.search(r"different: ([0-9.]+) subwords .*more: ([0-9.]+) subwords", said, re.DOTALL)
    assert found is not None
    words = [" zebra", " saw", " zebra", " zap", " yak"]
    for tokenizer, said_mean in zip((before, after), found.groups(), strict=True):
        mean = sum(len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words) / len(words)
        assert float(said_mean) == pytest.approx(mean, abs=6e-4)


def test_words_of_a_domain_go_from_text_to_pretraining(root: Path) -> None:
    """Tokenized and trained with the same file, the word is one token of the dataset, and its row learns from it."""
    base = AutoTokenizer.from_pretrained(root / "model")
    text, tokens = root / "text.txt", words(root, "unbelievable")
    text.write_text("good film unbelievable the unbelievable\n" * 40, encoding="utf-8")
    model = ("--tokenizer", str(root / "model"))
    made = ("--output", str(root / "tokens"), *model, "--eos", "[SEP]")
    run_data("tokenize", str(text), *made, "--added-tokens", str(tokens))
    run_data("tokenize", str(text), "--output", str(root / "plain"), *model, "--eos", "[SEP]")
    run = make_config(root, tokens).model_copy(
        update={
            "model": ModelConfig(source=str(root / "model"), task="mlm", added_tokens=tokens),
            "data": StreamData(
                objective="mlm",
                sources=(str(root / "tokens"),),
                validation=str(root / "tokens"),
                sequence_length=16,
                isolate=False,
                max_epochs=9,
                cache=root / "cache",
            ),
            "train": TrainConfig(max_steps=2, global_batch_size=4, metric="loss"),
        }
    )
    seen = start(run, "single", 1)
    assert seen is not None
    assert seen[0]["error"] is None
    new = AutoModel.from_pretrained(root / "run" / "model").get_input_embeddings().weight.detach()[len(base)]
    before = AutoModel.from_pretrained(root / "model").get_input_embeddings().weight.detach()[base.unk_token_id]
    assert float((new - before).abs().max()) > 1e-4
    plain = run.data.model_copy(update={"sources": (str(root / "plain"),), "validation": str(root / "plain")})
    other = run.model_copy(update={"data": plain, "run_dir": root / "other"})
    with pytest.raises(ConfigError, match=rf"another tokenizer .* --added-tokens {tokens}"):
        build_task(other, build_accelerator(other))


def test_words_that_the_tokenizer_has_are_refused_by_tokenize(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = words(root, "good")
    made = ("--output", str(root / "tokens"), "--tokenizer", str(root / "model"), "--added-tokens", str(file))
    run_data("tokenize", str(root / "data.csv"), *made, code=2)
    assert f"--added-tokens ({file}): the tokenizer has good already" in capsys.readouterr().err


def run_data(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as done:
        main(["data", *arguments])
    assert done.value.code == code
