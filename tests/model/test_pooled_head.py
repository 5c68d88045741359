"""Our own classification head: what it computes, on which architectures, by which methods it is trained, stored and reopened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from tests.tiny import tiny_bert
from trainer.backend.wrap import repeated_blocks
from trainer.config import ModelConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.export import export_model, load_exported
from trainer.model.heads import encoder_of, head_modules, head_parameters
from trainer.model.load import build_model, load_tokenizer
from trainer.model.methods import check_method
from trainer.model.pooled_head import pool
from trainer.predict.adapters import AdapterPredictor
from trainer.predict.classify import load_predictor

LABELS = ("negative", "positive", "neither")
INPUTS = {
    "input_ids": torch.tensor([[2, 5, 6, 7, 3], [2, 10, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "bert": BertConfig(vocab_size=60, **SIZES),
    "roberta": RobertaConfig(vocab_size=60, pad_token_id=0, **SIZES),
    "albert": AlbertConfig(vocab_size=60, embedding_size=16, **SIZES),
    "electra": ElectraConfig(vocab_size=60, embedding_size=16, **SIZES),
    "mpnet": MPNetConfig(vocab_size=60, pad_token_id=0, **SIZES),
    "deberta-v2": DebertaV2Config(vocab_size=60, **SIZES),
    "distilbert": DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    "xlnet": XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=2, d_inner=48, pad_token_id=0),
    "gpt2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=2, eos_token_id=3),
    "llama": LlamaConfig(vocab_size=60, pad_token_id=0, **SIZES),
    "opt": OPTConfig(
        vocab_size=60, word_embed_proj_dim=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, pad_token_id=0
    ),
}  # fmt: skip
METHODS = ("full", "head", "bitfit", "lora", "dora", "rslora", "qlora", "vera", "ia3", "adapter")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def config_of(source: Path, method: str = "full", **model: Any) -> RunConfig:
    return RunConfig(name="t", model=ModelConfig(source=str(source), **model), method={"name": method})  # type: ignore[arg-type]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def export(model: nn.Module, config: RunConfig, folder: Path) -> Path:
    """As trainer/output.py does it."""
    whole = config.method.name in ("full", "head", "bitfit")
    state = {name: one.detach() for name, one in model.named_parameters() if whole or one.requires_grad}
    info = {"task": "classification", "method": config.method.name, "base": config.model.source, "label_names": LABELS}
    info |= {"pooling": config.model.pooling, "head_layers": config.model.head_layers}
    info |= {"max_length": 64}
    info["quantization"] = config.method.model_dump(include={"quantize", "double_quantization"}) or None
    export_model(model, state, load_tokenizer(config.model), folder, info)
    return folder


@pytest.mark.parametrize("layers", [None, 1, 2])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_logits_are_those_of_pooling_by_hand(pooling: Any, layers: Any, bert: Path, accelerator: Accelerator) -> None:
    model = build_model(config_of(bert, pooling=pooling, head_layers=layers), LABELS, accelerator)
    weights = dict(model.named_parameters())
    hidden = AutoModel.from_pretrained(bert).eval()(**INPUTS).last_hidden_state.detach()
    rows = [hidden[0, :5], hidden[1, :3]]
    pooled = torch.stack([row[0] if pooling == "first" else row.mean(dim=0) for row in rows])
    if layers == 2:
        pooled = (pooled @ weights["classifier.dense.weight"].T + weights["classifier.dense.bias"]).tanh()
    expected = pooled @ weights["classifier.out_proj.weight"].T + weights["classifier.out_proj.bias"]
    torch.testing.assert_close(logits(model), expected.detach(), rtol=1e-5, atol=1e-6)
    assert ("classifier.dense.weight" in weights) is (layers == 2)
    assert not any("pooler" in name for name in weights)


def test_the_mean_is_taken_in_fp32_and_without_a_mask_over_all() -> None:
    hidden = torch.full((1, 3000, 2), 1.01, dtype=torch.bfloat16)  # a bf16 sum of these would stop growing at 256
    mask = torch.ones(1, 3000, dtype=torch.int64)
    for given in (mask, None):
        assert torch.equal(pool(hidden, given, "mean"), hidden[:, 0])
    assert torch.isfinite(pool(hidden, torch.zeros_like(mask), "mean")).all()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_encoders_and_decoders_of_transformers_take_the_head(
    kind: str, bert: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(ARCHITECTURES[kind]).save_pretrained(tmp_path)
    load_tokenizer(ModelConfig(source=str(bert))).save_pretrained(tmp_path)
    config = config_of(tmp_path, pooling="mean", head_layers=2, dropout=None)
    model: Any = build_model(config, LABELS, accelerator)
    assert head_modules(model) == ("classifier",) and len(repeated_blocks(encoder_of(model))) in (1, 2)
    outputs = AutoModel.from_pretrained(tmp_path).eval()(**INPUTS).last_hidden_state.detach()
    pooled = torch.stack([outputs[0].mean(dim=0), outputs[1, :3].mean(dim=0)])
    torch.testing.assert_close(logits(model), model.classifier(pooled).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_head_and_what_it_exports_gives_the_same_logits(
    method: str, bert: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    config = config_of(bert, method, pooling="mean", head_layers=2)
    model = build_model(config, LABELS, accelerator).train()
    before = logits(model)
    trainable = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    torch.nn.functional.cross_entropy(model(**INPUTS).logits, torch.tensor([1, 2])).backward()
    trained_heads = [one for one in head_parameters(model) if one.requires_grad]
    assert len(trained_heads) == 4 and all(one.grad is not None for one in trained_heads)
    optimizer.step()
    after = logits(model)
    assert not torch.equal(before, after)
    loaded, _, _ = load_exported(export(model, config, tmp_path))
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0 if method != "rslora" else 1e-7)  # alpha's place


def test_the_export_says_what_it_is_and_can_be_a_source(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    config = config_of(bert, pooling="mean", head_layers=2, head_dropout=0.3)
    model = build_model(config, LABELS, accelerator)
    export(model, config, tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())
    assert stored["pooled_head"] == {"pooling": "mean", "layers": 2, "dropout": 0.3}
    assert stored["architectures"] == ["PooledBertForSequenceClassification"]
    again = build_model(config_of(tmp_path / "one", pooling="mean", head_layers=2), LABELS, accelerator)
    assert torch.equal(logits(again), logits(model))
    plain = build_model(config_of(tmp_path / "one"), LABELS, accelerator)
    assert not hasattr(plain.config, "pooled_head") and type(plain).__name__ == "BertForSequenceClassification"
    # plain transformers opens the encoder and draws a head, so load_exported is what reopens it
    opened, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert {"classifier.weight", "classifier.bias"} <= set(report["missing_keys"])
    assert torch.equal(opened.bert.embeddings.word_embeddings.weight, model.get_input_embeddings().weight)


def test_plain_peft_puts_an_adapter_on_the_base_that_load_exported_builds(
    bert: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    config = config_of(bert, "lora", pooling="first", head_layers=1)
    model = build_model(config, LABELS, accelerator)
    export(model, config, tmp_path)
    base = build_model(config_of(bert, pooling="first", head_layers=1), LABELS, accelerator)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


@pytest.mark.parametrize(("setting", "expected"), [(None, 0.1), (0.0, 0.0), (0.4, 0.4)])
def test_the_heads_dropout_is_the_setting_or_the_architectures(
    setting: float | None, expected: float, bert: Path, accelerator: Accelerator
) -> None:
    model: Any = build_model(config_of(bert, pooling="mean", head_dropout=setting), LABELS, accelerator)
    assert model.classifier.dropout.p == expected


def test_new_weights_are_drawn_from_the_seed_as_the_architecture_does(bert: Path, accelerator: Accelerator) -> None:
    one, two = (build_model(config_of(bert, pooling="mean", head_layers=2), LABELS, accelerator) for _ in range(2))
    weights = dict(one.named_parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in two.named_parameters())
    assert not weights["classifier.dense.bias"].any()
    assert float(weights["classifier.dense.weight"].detach().std()) == pytest.approx(0.02, rel=0.1)
    build_model(config_of(bert, pooling="mean", init="random"), LABELS, accelerator)


def test_recomputing_gives_the_same_gradients(bert: Path, accelerator: Accelerator) -> None:
    gradients = []
    for recompute in (False, True):
        config = config_of(
            bert, pooling="mean", gradient_checkpointing=recompute, dropout=0.0, attention_dropout=0.0, head_dropout=0.0
        )
        model: Any = build_model(config, LABELS, accelerator).train()
        assert model.is_gradient_checkpointing is recompute
        model(**INPUTS).logits.square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("kind", "pooling", "message"),
    [
        ("gpt2", "first", r"model\.pooling \(first\): the first token of gpt2, a decoder, sees no other token; use model.pooling=mean"),
        ("llama", "first", r"the first token of llama, a decoder"),
        ("t5", "mean", r"model\.pooling \(mean\) reads the last layer of one stack, and t5 is an encoder and a decoder; set"),
    ],
)  # fmt: skip
def test_architectures_that_cannot_be_pooled_are_refused_before_weights_are_read(
    kind: str, pooling: Any, message: str, bert: Path, tmp_path: Path
) -> None:
    (ARCHITECTURES | {"t5": T5Config(vocab_size=60)})[kind].save_pretrained(tmp_path)  # no weights are there
    load_tokenizer(ModelConfig(source=str(bert))).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_method(config_of(tmp_path, pooling=pooling))


def test_an_encoder_without_a_masked_language_model_is_no_decoder(bert: Path, tmp_path: Path) -> None:
    ARCHITECTURES["xlnet"].save_pretrained(tmp_path)
    load_tokenizer(ModelConfig(source=str(bert))).save_pretrained(tmp_path)
    check_method(config_of(tmp_path, pooling="first"))


@pytest.mark.parametrize(
    ("target", "names", "problem_type"),
    [
        ("single", LABELS, "single_label_classification"),
        ("multi", LABELS, "multi_label_classification"),
        ("regression", ("score",), "regression"),
    ],
)
def test_the_exported_configuration_names_transformers_problem_type(
    target: Any, names: tuple[str, ...], problem_type: str, bert: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    config = RunConfig(**(config_of(bert).model_dump() | {"data": {"kind": "classification", "target": target}}))
    model = build_model(config, names, accelerator)
    export(model, config, tmp_path)
    stored = AutoConfig.from_pretrained(tmp_path)
    assert (stored.problem_type, stored.num_labels) == (problem_type, len(names))


def test_adapters_with_pooled_heads_answer_in_turn(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    runs = {}
    for number, name in enumerate(("one", "two")):
        config = config_of(bert, "lora", pooling="mean", head_layers=2)
        model = build_model(config, LABELS, accelerator)
        with torch.no_grad():
            for parameter in head_parameters(model):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        runs[name] = export(model, config, tmp_path / name)
    together = AdapterPredictor(runs, torch.device("cpu"))
    assert not together.mixes  # PEFT mixes linear layers only; its refusal would end the prediction
    requests = [(text, name) for text in ("good film", "awful") for name in runs]
    alone = {name: load_predictor(folder, torch.device("cpu")) for name, folder in runs.items()}
    answers = together.predict(requests)
    for (text, name), answer in zip(requests, answers, strict=True):
        assert answer.facts()["probabilities"] == pytest.approx(
            alone[name].predict([text])[0].facts()["probabilities"], rel=1e-4
        )
    assert answers[0].facts()["probabilities"] != answers[1].facts()["probabilities"]


def test_the_head_of_xlnet_is_refused_because_it_reads_the_padding(tmp_path: Path) -> None:
    ARCHITECTURES["xlnet"].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.pooling \(model\): the head of xlnet.*use model\.pooling=mean"):
        check_method(config_of(tmp_path))
    check_method(config_of(tmp_path, pooling="mean"))
