"""What a run leaves opens with plain transformers and PEFT and predicts the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from tests.tiny import tiny_bert
from trainer.config import FullConfig, HeadConfig, LoraConfig, ModelConfig, RunConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.model.export import export_model, load_exported
from trainer.model.load import build_model, load_tokenizer
from trainer.optim import build_optimizer

LABELS = ("negative", "positive", "neither")
METHODS = (FullConfig(), HeadConfig(), LoraConfig(rank=2, dropout=0.1))


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A decoder whose tokenizer has no padding token."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=155, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3)
    GPT2Model(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(bert / "tokenizer.json"), eos_token="[SEP]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("source", ["bert", "gpt2"])
def test_exported_model_predicts_the_same(
    source: str, method: Any, tmp_path: Path, accelerator: Accelerator, request: pytest.FixtureRequest
) -> None:
    model, config = trained(request.getfixturevalue(source), method, accelerator)
    export(model, config, tmp_path)
    loaded, tokenizer, info = load_exported(tmp_path)
    assert info["label_names"] == list(LABELS) and tokenizer.pad_token_id is not None
    assert torch.equal(logits(loaded), logits(model))


def test_an_exported_index_that_names_a_file_elsewhere_is_refused(
    bert: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    model, config = trained(bert, FullConfig(), accelerator)
    export(model, config, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    places = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(ConfigError, match=r"index\.json names .*, which is no file beside it"):
        load_exported(tmp_path / "out")


def test_adapter_opens_with_plain_peft(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model, config = trained(bert, LoraConfig(rank=2), accelerator)
    export(model, config, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(bert)


def test_adapter_carries_a_pooler_that_the_base_lacks(tmp_path: Path, bert: Path, accelerator: Accelerator) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_bert(base)
    BertModel(BertConfig.from_pretrained(base), add_pooling_layer=False).save_pretrained(base)
    model, config = trained(base, LoraConfig(rank=2), accelerator)
    export(model, config, out)
    assert torch.equal(logits(load_exported(out)[0]), logits(model))


@pytest.mark.parametrize("method", [FullConfig(), HeadConfig()], ids=lambda method: method.name)
def test_whole_model_opens_with_plain_transformers(
    method: Any, bert: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    model, config = trained(bert, method, accelerator)
    export(model, config, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert AutoTokenizer.from_pretrained(tmp_path)("good film")["input_ids"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_nothing_of_samestep_stands_in_the_exported_configuration(
    method: Any, bert: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    model, config = trained(bert, method, accelerator)
    export(model, config, tmp_path)
    for file in tmp_path.glob("*config.json"):
        assert "samestep" not in file.read_text()
    assert not list(tmp_path.glob("*.bin"))


def test_adapter_holds_trained_tensors_only(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model, config = trained(bert, LoraConfig(rank=2), accelerator)
    export(model, config, tmp_path)
    written = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert written == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_state_that_was_not_gathered_is_an_error(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model, config = trained(bert, LoraConfig(rank=2), accelerator)
    state = trainable(model)
    state[next(iter(state))] = torch.empty(0)
    with pytest.raises(CheckpointError, match="exported empty"):
        export_model(model, state, load_tokenizer(config.model), tmp_path, {})


def test_missing_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no exported model"):
        load_exported(tmp_path / "nowhere")


def test_damaged_weights_are_an_error(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model, config = trained(bert, FullConfig(), accelerator)
    export(model, config, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not open"):
        load_exported(tmp_path)


def test_adapter_with_a_lost_tensor_is_an_error(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model, config = trained(bert, LoraConfig(rank=2), accelerator)
    export(model, config, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lack"):
        load_exported(tmp_path)


def test_whole_model_with_a_lost_tensor_is_an_error(bert: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model, config = trained(bert, FullConfig(), accelerator)
    export(model, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("classifier.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lack"):
        load_exported(tmp_path)


def trained(folder: Path, method: Any, accelerator: Accelerator) -> tuple[nn.Module, RunConfig]:
    """A model after two large steps, in evaluation mode."""
    config = RunConfig(name="x", model=ModelConfig(source=str(folder)), method=method)
    model = build_model(config, LABELS, accelerator).train()
    optimizer = build_optimizer(model, config, fused=True)
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        model(**batch()).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), config


def export(model: nn.Module, config: RunConfig, folder: Path) -> None:
    """As the loop does: trainable tensors for lora, all of them otherwise."""
    state = trainable(model) if config.method.name == "lora" else {n: p.detach() for n, p in model.named_parameters()}
    info = {"base": config.model.source, "label_names": list(LABELS), "method": config.method.name}
    export_model(model, state, load_tokenizer(config.model), folder, info)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def batch() -> dict[str, torch.Tensor]:
    """Two rows, one of them padded."""
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    ids = torch.tensor([[5, 9, 14, 20, 21, 11], [7, 8, 13, 19, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module) -> torch.Tensor:
    """Of the batch, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**batch()).logits
