"""Each method trains exactly the weights it says; LoRA's sizes and targets; mistakes found on the meta device."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
)

from tests.tiny import tiny_bart, tiny_llama, tiny_t5
from trainer.config import (
    AdapterConfig,
    BitfitConfig,
    DoraConfig,
    FullConfig,
    HeadConfig,
    Ia3Config,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QloraConfig,
    RunConfig,
    StreamData,
    TrainConfig,
    VeraConfig,
)
from trainer.errors import ConfigError
from trainer.model.architecture import load_architecture, meta_model
from trainer.model.bottleneck import Bottleneck
from trainer.model.methods import METHODS, apply_method, check_method
from trainer.model.targets import resolve_targets

SMALL_BERT = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
SMALL_ROBERTA = RobertaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
SMALL_GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LoraConfig(rank=8, targets=("query", "value")), 294_912),
        (LoraConfig(rank=16, targets=("query", "key", "value", "attention.output.dense")), 1_179_648),
    ],
)
def test_lora_on_bert_base_adds_the_published_number_of_parameters(method: LoraConfig, expected: int) -> None:
    model = on_meta(BertConfig(), method)
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == expected


def test_lora_adds_the_published_share_of_the_matrices_it_adapts() -> None:
    attention = ("query", "key", "value", "attention.output.dense")
    for rank, targets, share in ((16, attention, 0.0417), (8, ("query",), 0.0208)):
        model = on_meta(BertConfig(), LoraConfig(rank=rank, targets=targets))
        added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        adapted = sum(
            model.get_submodule(f"base_model.model.{name}.base_layer").weight.numel()
            for name in resolve_targets(plain(BertConfig()), targets)
        )
        assert added / adapted == pytest.approx(share, abs=5e-5)


D, FF, LAYERS, TOKENS = 768, 3072, 12, 20
HEAD = 2 * D + 2


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (BitfitConfig(), LAYERS * (4 * D + FF + D + 2 * D) + D + D + HEAD),  # layers, embeddings' norm, pooler
        (PromptConfig(), TOKENS * D + HEAD),
        (PrefixConfig(), TOKENS * 2 * LAYERS * D + HEAD),
        (PrefixConfig(projection_size=512), TOKENS * D + D * 512 + 512 + 512 * 2 * LAYERS * D + 2 * LAYERS * D + HEAD),
        (PTuningConfig(), TOKENS * D + D * 128 + 128 + 128 * 128 + 128 + 128 * D + D + HEAD),
        (Ia3Config(), LAYERS * (D + D + D + FF) + HEAD),  # keys, values, input of both dense layers
        (AdapterConfig(size=64), LAYERS * 2 * (2 * D * 64 + 64 + D) + HEAD),
        (AdapterConfig(size=64, placement="pfeiffer"), LAYERS * (2 * D * 64 + 64 + D) + HEAD),
        (VeraConfig(targets=("query", "value")), LAYERS * 2 * (256 + D) + HEAD),
        (DoraConfig(targets=("query",)), LAYERS * (2 * 8 * D + D) + HEAD),
    ],
)  # fmt: skip
def test_a_method_on_bert_base_trains_what_its_formula_says(method: MethodConfig, expected: int) -> None:
    model = on_meta(BertConfig(), method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_the_table_has_a_row_for_every_method_of_the_settings() -> None:
    union = RunConfig.model_fields["method"].annotation
    assert {kind.model_fields["name"].default for kind in get_args(union)} == set(METHODS)


def test_a_fresh_bottleneck_changes_nothing_and_follows_the_right_layers() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(SMALL_BERT).eval()
    ids = torch.randint(0, 50, (2, 5))
    before = model(ids).logits
    apply_method(model, AdapterConfig(size=4, placement="pfeiffer"))
    places = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    assert places == [f"bert.encoder.layer.{block}.output.dense" for block in (0, 1)]
    assert torch.equal(model(ids).logits, before)


def test_full_trains_everything() -> None:
    model = on_meta(SMALL_BERT, FullConfig())
    assert all(p.requires_grad for p in model.parameters())


def test_head_trains_the_head_only() -> None:
    model = on_meta(SMALL_BERT, HeadConfig())
    assert trainable(model) == ["classifier.weight", "classifier.bias"]


def test_head_also_trains_what_the_checkpoint_lacks() -> None:
    model = on_meta(SMALL_BERT, HeadConfig(), new_modules=["bert.pooler.dense"])
    assert len(trainable(model)) == 4 and "bert.pooler.dense.weight" in trainable(model)


def test_lora_trains_adapters_and_head() -> None:
    model = on_meta(SMALL_BERT, LoraConfig(rank=2, targets=("query",)))
    names = trainable(model)
    assert sum("lora_A" in name for name in names) == sum("lora_B" in name for name in names) == 2
    assert sum("classifier.modules_to_save" in name for name in names) == len(names) - 4 == 2


def test_lora_also_trains_and_stores_what_the_checkpoint_lacks() -> None:
    model = on_meta(SMALL_BERT, LoraConfig(rank=2, targets=("query",)), new_modules=["bert.pooler.dense"])
    assert any("pooler.dense.modules_to_save.default.weight" in name for name in trainable(model))


def test_dotted_target_matches_attention_only() -> None:
    targets = resolve_targets(plain(SMALL_BERT), ("attention.output.dense",))
    assert targets == [f"bert.encoder.layer.{block}.attention.output.dense" for block in (0, 1)]
    model = on_meta(SMALL_BERT, LoraConfig(rank=2, targets=("attention.output.dense",)))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {f"base_model.model.{name}" for name in targets}


def test_all_linear_is_every_linear_layer_of_the_blocks() -> None:
    names = resolve_targets(plain(SMALL_BERT), "all-linear")
    assert resolve_targets(plain(SMALL_BERT), ("all-linear",)) == names  # as --targets all-linear and lists have it
    kinds = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    kinds += ["intermediate.dense", "output.dense"]
    assert names == [f"bert.encoder.layer.{block}.{kind}" for block in (0, 1) for kind in kinds]


def test_all_linear_covers_conv1d_of_gpt2() -> None:
    names = resolve_targets(plain(SMALL_GPT2), "all-linear")
    assert len(names) == 2 * 4 and "transformer.h.1.mlp.c_proj" in names
    model = on_meta(SMALL_GPT2, LoraConfig(rank=2))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 8


@pytest.mark.parametrize(("make", "per_stack"), [(tiny_t5, (6, 10)), (tiny_bart, (6, 10))], ids=["t5", "bart"])
def test_all_linear_covers_encoder_and_decoder(make: Any, per_stack: tuple[int, int], tmp_path: Path) -> None:
    """Two blocks each: four layers of an attention, of which the decoder has two, and two of the feed-forward."""
    config = ModelConfig(source=str(make(tmp_path)), task="seq2seq")
    layers = meta_model(config, load_architecture(config, ()))
    names = resolve_targets(layers, "all-linear")
    found = [sum(f"{stack}." in name for name in names) for stack in ("encoder", "decoder")]
    assert found == [2 * count for count in per_stack]
    assert not any(name.startswith("lm_head") for name in names)
    model = apply_method(layers, LoraConfig(rank=2), task="seq2seq")
    assert sum(name.endswith("lora_A.default.weight") for name in trainable(model)) == 2 * sum(per_stack)


def test_a_target_never_reaches_into_the_head() -> None:
    names = resolve_targets(plain(SMALL_ROBERTA), ("dense",))
    assert names and not any(name.startswith("classifier") for name in names)
    model = on_meta(SMALL_ROBERTA, LoraConfig(rank=2, targets=("dense",)))
    assert not any("lora_" in name and "classifier" in name for name, _ in model.named_parameters())


def test_unknown_target_lists_the_linear_layers_and_suggests_one(tmp_path: Path) -> None:
    SMALL_BERT.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_method(lora_run(tmp_path, LoraConfig(targets=("qeury", "value", "valeu"))))
    first, second = caught.value.problems
    assert first.startswith("method.targets (qeury)") and "did you mean query?" in first
    assert "query, key, value, attention.output.dense, intermediate.dense, output.dense, pooler.dense" in first
    assert "did you mean value?" in second


def test_rank_above_the_smallest_side_of_a_layer_is_refused(tmp_path: Path) -> None:
    SMALL_BERT.save_pretrained(tmp_path)
    check_method(lora_run(tmp_path, LoraConfig(rank=16)))
    with pytest.raises(
        ConfigError, match=r"method.rank \(17\) must be at most 16, the smaller side of .*query \(16, 16\)"
    ):
        check_method(lora_run(tmp_path, LoraConfig(rank=17)))


def test_lora_on_random_weights_is_refused(tmp_path: Path) -> None:
    SMALL_BERT.save_pretrained(tmp_path)
    config = RunConfig(name="x", model=ModelConfig(source=str(tmp_path), init="random"), method=LoraConfig())
    with pytest.raises(ConfigError, match="needs pretrained weights"):
        check_method(config)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (BitfitConfig(), "bitfit.* biases, and the layers of LlamaForCausalLM have none; use method.name=lora"),
        (HeadConfig(), "head.* which does not work with model.task=clm; use full or lora"),
        (PromptConfig(), "virtual tokens before a row.* data.isolate=false"),
    ],
)
def test_a_method_that_does_not_fit_the_model_or_its_data_is_refused_before_loading(
    method: MethodConfig, message: str, tmp_path: Path
) -> None:
    tiny_llama(tmp_path)
    config = RunConfig(
        name="x",
        model=ModelConfig(source=str(tmp_path), task="clm"),
        method=method,
        data=StreamData(),
        train=TrainConfig(max_steps=1, metric="loss"),
    )
    with pytest.raises(ConfigError, match=message):
        check_method(config)


@pytest.mark.parametrize("method", [Ia3Config(), AdapterConfig()])
def test_an_architecture_without_a_known_choice_of_layers_lists_them(method: MethodConfig, tmp_path: Path) -> None:
    AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=32, embedding_size=8).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match=r"albert; set method.targets.*It has: .*query"):
        check_method(RunConfig(name="x", model=ModelConfig(source=str(tmp_path)), method=method))


def test_a_quantized_model_is_refused_but_for_what_quantizes_itself(tmp_path: Path) -> None:
    quantized = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    quantized.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantized.save_pretrained(tmp_path)
    for method in (FullConfig(), LoraConfig(), QloraConfig()):
        with pytest.raises(ConfigError, match=r"stored quantized .bitsandbytes.*method.name=qlora"):
            check_method(RunConfig(name="x", model=ModelConfig(source=str(tmp_path)), method=method))


def test_check_needs_no_weights(tmp_path: Path) -> None:
    SMALL_BERT.save_pretrained(tmp_path)
    check_method(lora_run(tmp_path, LoraConfig()))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def plain(architecture: PretrainedConfig) -> torch.nn.Module:
    """The model on the meta device."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(architecture)


def on_meta(architecture: PretrainedConfig, method: MethodConfig, **options) -> torch.nn.Module:
    """The model on the meta device with its method applied."""
    model = plain(architecture)
    with torch.device("meta"):
        return apply_method(model, method, **options)


def trainable(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def lora_run(folder: Path, method: LoraConfig) -> RunConfig:
    """A run on the architecture in `folder`."""
    return RunConfig(name="x", model=ModelConfig(source=str(folder)), method=method)
