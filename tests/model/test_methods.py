"""Each method trains exactly the weights it says; LoRA's sizes and targets; mistakes found on the meta device."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
)

from trainer.config import FullConfig, HeadConfig, LoraConfig, ModelConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.methods import apply_method, check_method, resolve_targets

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
    kinds = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    kinds += ["intermediate.dense", "output.dense"]
    assert names == [f"bert.encoder.layer.{block}.{kind}" for block in (0, 1) for kind in kinds]


def test_all_linear_covers_conv1d_of_gpt2() -> None:
    names = resolve_targets(plain(SMALL_GPT2), "all-linear")
    assert len(names) == 2 * 4 and "transformer.h.1.mlp.c_proj" in names
    model = on_meta(SMALL_GPT2, LoraConfig(rank=2))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 8


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


def test_check_needs_no_weights(tmp_path: Path) -> None:
    SMALL_BERT.save_pretrained(tmp_path)
    check_method(lora_run(tmp_path, LoraConfig()))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def plain(architecture: PretrainedConfig) -> torch.nn.Module:
    """The model on the meta device."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(architecture)


def on_meta(architecture: PretrainedConfig, method: FullConfig | HeadConfig | LoraConfig, **options) -> torch.nn.Module:
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
