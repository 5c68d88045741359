"""A quantized base: which layers, how many bytes, what bitsandbytes must not do to it, and SmolLM2's real weights."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_bert
from trainer.config import ModelConfig, QloraConfig
from trainer.model.architecture import load_architecture
from trainer.model.load import load_weights, quantization_of
from trainer.model.quantize import num_elements, stored_bytes


def load(folder: Path, method: QloraConfig, precision: str = "no") -> torch.nn.Module:
    model = ModelConfig(source=str(folder))
    architecture = load_architecture(model, ("0", "1"))
    return load_weights(model, architecture, quantization_of(model, method, architecture, precision=precision))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("quantize") / "bert", hidden_size=64)


def test_the_layers_of_the_blocks_are_quantized_and_what_is_trained_is_not(folder: Path) -> None:
    model = load(folder, QloraConfig())
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert {kind for name, kind in kinds.items() if ".layer." in name} == {"Linear4bit"}
    assert {kind for name, kind in kinds.items() if ".layer." not in name} == {"Linear"}  # pooler and classifier
    assert all(p.dtype == torch.float32 for p in model.parameters())  # 4-bit weights too: packed into words
    plain = load(folder, QloraConfig(quantize="int8"))
    assert "Linear8bitLt" in {type(module).__name__ for module in plain.modules()}


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_computed_in_the_precision_of_the_run(folder: Path, precision: str, dtype: torch.dtype) -> None:
    layers = [m for m in load(folder, QloraConfig(), precision).modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {dtype}
    fixed = load(folder, QloraConfig(compute_dtype="fp16"), precision)
    assert {m.compute_dtype for m in fixed.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)} == {torch.float16}


def test_evaluation_leaves_the_quantized_weights_as_they_are(folder: Path) -> None:
    """bitsandbytes 0.50 would repack them for bf16 on a CPU that has AVX512-BF16, and round their scales."""
    model = load(folder, QloraConfig()).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        first = model(input_ids=ids).logits
        second = model.train().eval()(input_ids=ids).logits
    assert torch.equal(first, second)
    for name, p in model.named_parameters():  # bytes: four-bit weights, read as fp32, may be nan
        assert torch.equal(p.view(torch.int32), before[name].view(torch.int32)), name


@pytest.mark.slow
def test_smollm2_in_four_bits_takes_at_most_a_third_of_its_bf16_bytes() -> None:
    from trainer.data.assets import asset_path

    model = ModelConfig(source="asset:smollm2", task="clm")
    architecture = load_architecture(model, ())
    small = load_weights(model, architecture, quantization_of(model, QloraConfig(), architecture, precision="no"))[0]
    layers = [m for m in small.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    weights = [layer.weight for layer in layers]
    assert sum(map(num_elements, weights)) == 106_168_320  # 30 layers
    assert sum(map(stored_bytes, weights)) <= 0.32 * 2 * sum(map(num_elements, weights))
    assert small.config.tie_word_embeddings
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_pretrained(asset_path("smollm2"), dtype=torch.float32)
    wide = plain.model.layers[3].mlp.up_proj.weight
    back = bitsandbytes.functional.dequantize_4bit(
        small.model.layers[3].mlp.up_proj.weight.data, small.model.layers[3].mlp.up_proj.weight.quant_state
    )
    assert float((back - wide).norm() / wide.norm()) < 0.11  # NF4's error on normal weights is 9.6 %
