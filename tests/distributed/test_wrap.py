"""FSDP2 wraps models that `_no_split_modules` gets wrong: tied embeddings, tied biases, no block class named."""

import numpy as np
import pytest
import torch
import transformers as hf

from tests.rank_pool import run_ranks
from trainer.backend import build_accelerator, build_engine
from trainer.backend.wrap import modules_sharing_parameters, repeated_blocks, zero_buckets
from trainer.config import RunConfig, TrainConfig
from trainer.errors import BackendError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
MODELS = {
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "bert_mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, max_position_embeddings=16)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
        )
    ),
    "xlnet": lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32)),
}  # fmt: skip
NUM_BLOCKS = {"llama_tied": 2, "bert_mlm": 2, "gpt2": 2, "t5": 4, "bart": 4, "xlnet": 2}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def loss_and_norm(name: str) -> tuple[float, float, bool]:
    """One backward of a language-model loss through the engine, and whether tied weights are still one tensor."""
    config = RunConfig(name="t", train=TrainConfig(max_steps=1, global_batch_size=4))
    accelerator = build_accelerator(config)
    model = build(name)
    engine = build_engine(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))
    engine.model.eval()
    ids = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(1))
    share = ids.chunk(engine.world_size)[engine.rank]
    inputs = {"input_ids": share} | ({"decoder_input_ids": share} if name in ("t5", "bart") else {})
    with engine.micro_batch(last=True):
        logits = engine.forward(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), share.flatten(), reduction="sum") / ids.numel()
        engine.backward(loss)
    norm = engine.grad_norm()
    engine.step(norm, None)
    tied = engine.module.get_input_embeddings().weight is engine.module.get_output_embeddings().weight
    return engine.sum_over_ranks([float(loss.detach())])[0], norm, tied


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_by_structure(name: str) -> None:
    blocks = repeated_blocks(build(name))
    assert len(blocks) == NUM_BLOCKS[name]


def test_a_tied_bias_joins_the_group_of_the_tied_weight() -> None:
    groups = modules_sharing_parameters(build("bert_mlm"))
    assert len(groups) == 1
    assert {type(module).__name__ for module in groups[0]} == {"Embedding", "BertLMPredictionHead"}


@pytest.mark.parametrize("name", MODELS)
def test_fsdp_takes_the_gradient_of_single_and_keeps_ties(name: str) -> None:
    loss, norm, tied = run_ranks(loss_and_norm, "single", 1, args=(name,))[0]
    for found in run_ranks(loss_and_norm, "fsdp", 2, args=(name,)):
        np.testing.assert_allclose(found[:2], (loss, norm), rtol=1e-5)
        assert found[2] == tied


def wrapped_or_refused() -> str:
    """What a BERT's wrapping says of the block classes that the accelerate configuration names; runs on every rank."""
    try:
        loss_and_norm("bert_mlm")
    except BackendError as error:
        return str(error)
    return "wrapped"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("BertLayer", "wrapped"),
        (
            "BertLayer,BertEmbeddings",
            "fsdp_config.fsdp_transformer_layer_cls_to_wrap (BertLayer,BertEmbeddings) must be this model's repeated blocks, "
            "BertLayer, which samestep finds by itself; leave it out",
        ),
    ],
)
def test_block_classes_that_the_configuration_names_must_be_those_that_are_wrapped(named: str, said: str) -> None:
    environ = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": named}
    assert run_ranks(wrapped_or_refused, "fsdp", 2, environ=environ) == [said, said]


def test_zero_buckets_follow_the_size_of_the_model() -> None:
    assert zero_buckets(num_parameters=10_000, hidden_size=16, stage=2)["reduce_bucket_size"] == 10_000
    assert zero_buckets(num_parameters=10_001, hidden_size=16, stage=2)["allgather_bucket_size"] == 10_002
    large = zero_buckets(num_parameters=7_000_000_000, hidden_size=4096, stage=3)
    assert large["reduce_bucket_size"] == 500_000_000
    assert large["stage3_param_persistence_threshold"] == 40_960


def refusal_of_pure_bf16() -> str:
    config = RunConfig(name="t", train=TrainConfig(max_steps=1, global_batch_size=4))
    accelerator = build_accelerator(config)
    model = build("gpt2").to(torch.bfloat16)
    with pytest.raises(BackendError) as refused:
        build_engine(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(refused.value)


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_pure_bf16_training_is_refused(backend: str) -> None:
    for words in run_ranks(refusal_of_pure_bf16, backend, 2):
        assert "is bfloat16; there is no pure-bf16 training" in words
        assert "mixed_precision: bf16" in words
