"""The language task's numbers, against plain torch and plain text."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers

from tests.tiny import tiny_llama, tiny_tokens
from trainer.config import HeadConfig, LoraConfig, ModelConfig, RunConfig, StreamData, TrainConfig
from trainer.data.stream.open import open_streams
from trainer.errors import ConfigError
from trainer.loss import token_losses
from trainer.model.vocabulary import check_next_tokens
from trainer.task.clm import ClmTask, bytes_of_tokens, language_metrics

TEXT = "def f(x):\n    return x  # naïve, 素数 🙂\n"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ClmTask:
    root = tmp_path_factory.mktemp("clm")
    tiny_llama(root / "model")
    for name in ("train", "validation"):
        tiny_tokens(root / name, documents=60, seed=len(name))
    data = StreamData(
        sources=(str(root / "train"),), validation=str(root / "validation"), sequence_length=48, cache=root
    )
    config = RunConfig(
        name="clm",
        model=ModelConfig(source=str(root / "model"), task="clm", init="random"),
        data=data,
        train=TrainConfig(max_steps=2, global_batch_size=4, metric="loss"),
    )
    return ClmTask(config, open_streams(config))


def test_the_loss_is_plain_cross_entropy_over_targets(task: ClmTask) -> None:
    batch = task.training_batch(task.global_batch(1))
    logits = torch.randn(*batch["labels"].shape, 61)
    wanted = torch.nn.functional.cross_entropy(logits.view(-1, 61), batch["labels"].view(-1), reduction="sum")
    assert float(task.loss_sum(SimpleNamespace(logits=logits), batch)) == pytest.approx(float(wanted), rel=1e-6)
    losses = token_losses(logits, batch["labels"])
    assert losses.shape == batch["labels"].shape
    assert (losses[batch["labels"] == -100] == 0).all()


def test_without_samples_there_is_one_row_without_targets(task: ClmTask) -> None:
    batch = task.training_batch(task.global_batch(0)[:0])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 48)
    assert (batch["labels"] == -100).all()
    assert set(task.model_inputs(batch)) == {"input_ids", "position_ids"}
    assert [float(count) for count in task.counts(None, batch)][:2] == [0, 0]


def test_a_checkpoint_knows_the_datasets_by_their_ids_in_less_than_a_kilobyte(task: ClmTask) -> None:
    identity, streams = task.identity(), task.streams
    assert identity["data.sources[0]"] == streams.train.sources[0].catalog.dataset_id
    assert identity["data.validation"] == streams.validation.sources[0].catalog.dataset_id
    assert len(json.dumps(identity)) < 1000


def test_counts_become_bits_per_byte_and_padding(task: ClmTask) -> None:
    batch = task.training_batch(task.global_batch(0))
    num_bytes, tokens, positions = (float(count) for count in task.counts(None, batch))
    words = [task.tokenizer.decode([int(label)]) for label in batch["labels"].flatten() if 0 <= label < 60]
    assert num_bytes == sum(len(word) for word in words)  # the end of a document is no text
    assert 0 < tokens <= positions == 4 * 48
    metrics = task.train_metrics(2.0, 100, {"bytes": 300, "tokens": 150, "positions": 192}, 3.0)
    assert metrics == {
        "train/bits_per_byte": pytest.approx(200 / math.log(2) / 300),
        "train/padding": pytest.approx(1 - 150 / 192),
        "tokens_per_s": 50,
    }


def test_metrics_of_a_uniform_model_are_those_of_its_vocabulary() -> None:
    metrics = language_metrics(math.log(256) * 1000, 1000, 1000)
    assert metrics == pytest.approx({"loss": math.log(256), "perplexity": 256, "bits_per_byte": 8, "count": 1000})


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT * 20], trainer)
    return made


def spaces_marked() -> tokenizers.Tokenizer:
    words = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(TEXT.replace(" ", "\u2581")) - {"素"})]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True)
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    return made


@pytest.mark.parametrize("make", [byte_level, spaces_marked])
def test_tokens_stand_for_as_many_bytes_as_their_text_has(make: object) -> None:
    made = make()  # type: ignore[operator]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    sizes = bytes_of_tokens(tokenizer, len(tokenizer))
    ids = made.encode(TEXT).ids
    assert sum(sizes[ids]) == len(TEXT.encode())
    assert sizes[made.token_to_id("<end>")] == 0


def test_a_pretrained_model_learns_on_no_other_tokenizers_tokens(task: ClmTask, tmp_path: Path) -> None:
    """Every number would be another word."""
    for name, shift in (("own", 0), ("other", 1)):
        words = {f"w{number}": (number + shift) % 61 for number in range(61)}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w0").save_pretrained(tmp_path / name)
        shutil.copy(Path(task.config.model.source) / "config.json", tmp_path / name)
    file, own = tmp_path / "own" / "tokenizer.json", ModelConfig(source=str(tmp_path / "own"), task="clm")
    check_next_tokens(own, file)
    check_next_tokens(own.model_copy(update={"source": str(tmp_path / "other"), "init": "random"}), file)
    with pytest.raises(ConfigError, match=r"has another tokenizer than the one that made data\.sources"):
        check_next_tokens(own.model_copy(update={"source": str(tmp_path / "other")}), file)
    (tmp_path / "words.txt").write_text("novel\n")
    with pytest.raises(ConfigError, match=r"--tokenizer .*own --added-tokens .*words\.txt"):
        check_next_tokens(own.model_copy(update={"added_tokens": tmp_path / "words.txt"}), file)


def test_lora_and_pretrained_weights_work_and_a_head_is_refused(task: ClmTask, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, LlamaConfig

    from trainer.model.load import build_model

    config = LlamaConfig.from_pretrained(task.config.model.source)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = ModelConfig(source=str(tmp_path / "base"), task="clm")
    lora = task.config.model_copy(update={"model": model, "method": LoraConfig(rank=2, targets=("q_proj", "v_proj"))})
    adapted = build_model(lora, (), Accelerator(), vocab_size=task.vocab_size)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)
    with pytest.raises(ConfigError, match=r"method\.name \(head\)"):
        build_model(lora.model_copy(update={"method": HeadConfig()}), (), Accelerator(), vocab_size=task.vocab_size)
