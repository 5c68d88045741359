"""build_model: the same fp32 weights on every rank, settings that take effect or are refused, mistakes as one sentence."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)

from tests.json_values import JSON
from tests.tiny import tiny_bert
from trainer.config import (
    FullConfig,
    HeadConfig,
    Ia3Config,
    LoraConfig,
    ModelConfig,
    RunConfig,
    StreamData,
    TrainConfig,
)
from trainer.errors import ConfigError, DataError
from trainer.model.dropout import FAST_ATTENTION, FastDropout
from trainer.model.identity import files_of_index
from trainer.model.load import build_model, check_no_batch_statistics, load_architecture, load_tokenizer, model_location

LABELS = ("negative", "positive")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 173}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("method", [FullConfig(), HeadConfig(), LoraConfig(rank=2)])
def test_same_seed_builds_the_same_model_whatever_was_drawn_before(
    bert: Path, accelerator: Accelerator, method: Any
) -> None:
    states = []
    for seed, noise in ((1, 0), (1, 17), (2, 0)):
        torch.rand(noise)
        config = run(bert, method=method, train=TrainConfig(num_epochs=1, seed=seed))
        states.append(dict(build_model(config, LABELS, accelerator).named_parameters()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_pretrained_encoder_weights_are_kept(bert: Path, accelerator: Accelerator) -> None:
    model = build_model(run(bert), LABELS, accelerator)
    for name, weight in BertModel.from_pretrained(bert).named_parameters():
        assert torch.equal(model.get_parameter(f"bert.{name}"), weight)


def test_random_init_draws_the_encoder_too(bert: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture) -> None:
    config = run(bert, model={"init": "random"}, train=TrainConfig(num_epochs=1, seed=7))
    model = build_model(config, LABELS, accelerator)
    pretrained = BertModel.from_pretrained(bert).get_parameter("encoder.layer.0.output.dense.weight")
    assert not torch.equal(model.get_parameter("bert.encoder.layer.0.output.dense.weight"), pretrained)
    assert "all drawn from train.seed (7)" in capsys.readouterr().out


def test_weights_are_fp32_whatever_the_checkpoint_holds(tmp_path: Path, accelerator: Accelerator) -> None:
    BertModel(BertConfig(**TINY)).to(torch.bfloat16).save_pretrained(tmp_path)
    model = build_model(run(tmp_path), LABELS, accelerator)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_summary_says_what_is_trained_and_what_is_new(
    bert: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture
) -> None:
    build_model(run(bert, method=LoraConfig(rank=2, targets=("query",))), LABELS, accelerator)
    out = capsys.readouterr().out
    trained = 2 * 2 * (32 + 32) + 32 * 2 + 2
    size = BertConfig.from_pretrained(bert).vocab_size
    assert "BertForSequenceClassification" in out and f"vocabulary {size}" in out
    assert f"lora: {trained:,} parameters trainable (" in out
    assert "drawn from train.seed (0): classifier.bias, classifier.weight" in out


def test_missing_pooler_is_reported_and_trained_under_lora(
    tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture
) -> None:
    BertModel(BertConfig(**TINY), add_pooling_layer=False).save_pretrained(tmp_path)
    model = build_model(run(tmp_path, method=LoraConfig(rank=2)), LABELS, accelerator)
    assert "bert.pooler.dense.weight" in capsys.readouterr().out
    assert any("pooler" in name for name, p in model.named_parameters() if p.requires_grad)


def test_head_of_another_label_set_is_replaced(tmp_path: Path, accelerator: Accelerator) -> None:
    BertForSequenceClassification(BertConfig(num_labels=5, **TINY)).save_pretrained(tmp_path)
    model = build_model(run(tmp_path), ("a", "b", "c"), accelerator)
    assert model.get_parameter("classifier.weight").shape == (3, 32)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.num_labels == 3


def test_weights_of_another_shape_than_their_configuration_are_refused(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path)
    BertConfig(**{**TINY, "vocab_size": 200}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"word_embeddings\.weight has another shape in the weights"):
        build_model(run(tmp_path), LABELS, accelerator)


def test_weights_of_another_architecture_are_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=173, bos_token_id=0, eos_token_id=0)
    GPT2Model(config).save_pretrained(tmp_path)
    BertConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lack 100% of BertForSequenceClassification's encoder"):
        build_model(run(tmp_path), LABELS, accelerator)


@pytest.mark.parametrize("method", [LoraConfig(rank=2), Ia3Config(), FullConfig()])
def test_a_language_model_without_its_head_is_refused_where_the_head_would_not_be_trained(
    tmp_path: Path, accelerator: Accelerator, method: Any
) -> None:
    LlamaModel(LlamaConfig(**TINY, tie_word_embeddings=False)).save_pretrained(tmp_path)
    train = TrainConfig(max_steps=1, metric="loss")
    config = run(tmp_path, model={"task": "clm"}, method=method, data=StreamData(isolate=False), train=train)
    if method.name == "full":
        assert build_model(config, (), accelerator).get_parameter("lm_head.weight").requires_grad
        return
    with pytest.raises(ConfigError, match=r"its weights lack lm_head\.weight.*use method\.name=full"):
        build_model(config, (), accelerator)


def test_dropout_rates_reach_the_layers(bert: Path, accelerator: Accelerator) -> None:
    rates = {"dropout": 0.21, "attention_dropout": 0.22, "head_dropout": 0.23}
    model = build_model(run(bert, model=rates, method=LoraConfig(dropout=0.24)), LABELS, accelerator)
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, FastDropout)}
    assert all(p == 0.22 for name, p in found.items() if name.endswith("attention.self.dropout"))
    assert all(p == 0.24 for name, p in found.items() if "lora_dropout" in name)
    assert found["base_model.model.dropout"] == 0.23
    assert found["base_model.model.bert.embeddings.dropout"] == 0.21


@pytest.mark.parametrize(
    ("architecture", "setting"),
    [
        (LlamaConfig(**TINY), "dropout"),
        (LlamaConfig(**TINY), "head_dropout"),
        (GPT2Config(n_embd=32, n_layer=2, n_head=2), "head_dropout"),
    ],
)
def test_dropout_that_the_architecture_does_not_have_is_refused(
    tmp_path: Path, architecture: Any, setting: str
) -> None:
    architecture.pad_token_id = 0
    architecture.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"model.{setting} \(0.1\) would have no effect"):
        load_architecture(ModelConfig(source=str(tmp_path), **{setting: 0.1}), LABELS)


@pytest.mark.parametrize(("attention", "expected"), [("auto", FAST_ATTENTION), ("eager", "eager"), ("sdpa", "sdpa")])
def test_attention_kernel_is_the_one_asked_for(
    bert: Path, accelerator: Accelerator, attention: str, expected: str
) -> None:
    model = build_model(run(bert, model={"attention": attention}), LABELS, accelerator)
    assert model.config._attn_implementation == expected


def test_without_attention_dropout_auto_stays_sdpa(bert: Path, accelerator: Accelerator) -> None:
    model = build_model(run(bert, model={"attention_dropout": 0.0}), LABELS, accelerator)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_cannot_run_here_is_refused(bert: Path, accelerator: Accelerator) -> None:
    with pytest.raises(
        ConfigError, match=r"model.attention \(flash_attention_2\) cannot run here.*use model.attention=auto"
    ):
        build_model(run(bert, model={"attention": "flash_attention_2"}), LABELS, accelerator)


@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=2, dropout=0.1)])
def test_gradient_checkpointing_changes_no_gradient(bert: Path, accelerator: Accelerator, method: Any) -> None:
    gradients = []
    for use_checkpointing in (False, True):
        model = build_model(
            run(bert, model={"gradient_checkpointing": use_checkpointing}, method=method), LABELS, accelerator
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.ones_(parameter)
        torch.manual_seed(5)
        model.train()(input_ids=torch.arange(12).view(2, 6) + 5).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)


def test_missing_folder_is_one_sentence_with_the_fix(tmp_path: Path) -> None:
    for load in (load_tokenizer, lambda model: load_architecture(model, LABELS)):
        with pytest.raises(ConfigError, match=r"there is no such folder; give asset:minilm") as caught:
            load(ModelConfig(source=str(tmp_path / "nowhere")))
        assert str(tmp_path / "nowhere") in str(caught.value) and "\n" not in str(caught.value)


def test_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        model_location(str(tmp_path))


def test_folder_without_weights_is_one_sentence(tmp_path: Path, accelerator: Accelerator) -> None:
    BertConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load the weights") as caught:
        build_model(run(tmp_path), LABELS, accelerator)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_one_sentence(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot load the weights") as caught:
        build_model(run(tmp_path, model={"attention": "sdpa"}), LABELS, accelerator)
    assert "\n" not in str(caught.value)


def test_broken_configuration_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot load the configuration"):
        load_architecture(ModelConfig(source=str(tmp_path)), LABELS)


def test_unknown_asset_is_an_error() -> None:
    with pytest.raises(DataError):
        model_location("asset:minilmm")


def test_hub_id_passes_through() -> None:
    assert model_location("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"


def test_code_in_a_model_repository_is_refused_by_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('must not run')\n")
    with pytest.raises(ConfigError, match=r"set model\.trust_remote_code=true if you trust it"):
        load_architecture(ModelConfig(source=str(tmp_path)), LABELS)


def run(folder: Path, *, model: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """A run on the model in `folder`."""
    return RunConfig(name="x", model=ModelConfig(source=str(folder), **(model or {})), **settings)


def test_a_model_whose_step_depends_on_the_micro_batch_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match=r"model.source \(x\): 1 \(BatchNorm1d\) normalizes over the micro-batch"):
        check_no_batch_statistics("x", model)
    check_no_batch_statistics("x", nn.LayerNorm(2))


# An index of several files


@settings(max_examples=200, deadline=None)
@given(whole=JSON, places=st.dictionaries(st.text(), JSON), is_whole=st.booleans())
def test_any_json_is_an_index_of_files_beside_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: object, places: dict[str, object], is_whole: bool
) -> None:
    index = tmp_path_factory.getbasetemp() / "index.json"
    index.write_text(json.dumps(whole if is_whole else {"weight_map": places}))
    with suppress(ConfigError):
        assert all(file.parent == index.parent and file.is_file() for file in files_of_index(index))


@pytest.mark.parametrize("name", ["../bert/model.safetensors", "/etc/passwd", "lost.safetensors", ""])
def test_an_index_that_names_a_file_elsewhere_is_refused_before_it_is_read(
    name: str, bert: Path, accelerator: Accelerator, tmp_path: Path
) -> None:
    model = shutil.copytree(bert, tmp_path / "model")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}))
    build_model(run(model), LABELS, accelerator)  # not read beside whole weights
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"index\.json names .*, which is no file beside it"):
        build_model(run(model), LABELS, accelerator)
