"""FastDropout is dropout: the right rate, the right scale, the right gradient, decided by torch's RNG state alone."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from trainer.model.dropout import (
    FAST_ATTENTION,
    LEVELS,
    FastDropout,
    draw_levels,
    fast_attention_forward,
    fast_dropout,
    use_fast_dropout,
)

NUM = 1_000_003  # odd: the last random word is used in part


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_drop_rate_is_within_four_sigma(p: float) -> None:
    torch.manual_seed(3)
    dropped = (fast_dropout(torch.ones(NUM), p) == 0).float().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / NUM) + 0.5 / LEVELS


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_mean_and_variance_are_those_of_a_scaled_bernoulli(p: float) -> None:
    torch.manual_seed(4)
    y = fast_dropout(torch.ones(NUM, dtype=torch.float64), p)
    variance = p / (1 - p)
    assert abs(y.mean().item() - 1) < 4 * math.sqrt(variance / NUM)
    assert y.var().item() == pytest.approx(variance, rel=0.02)


def test_drop_rate_holds_over_many_draws_and_in_every_lane_of_a_word() -> None:
    torch.manual_seed(5)
    masks = torch.stack([fast_dropout(torch.ones(4096), 0.1) == 0 for _ in range(500)]).float()
    assert abs(masks.mean().item() - 0.1) < 4 * math.sqrt(0.09 / masks.numel())
    for lane in range(4):
        assert abs(masks[:, lane::4].mean().item() - 0.1) < 4 * math.sqrt(0.09 / (masks.numel() / 4))


def test_neighbours_and_successive_masks_are_independent() -> None:
    torch.manual_seed(6)
    first, second = ((fast_dropout(torch.ones(NUM), 0.3) == 0).double() - 0.3 for _ in range(2))
    limit = 4 * 0.21 / math.sqrt(NUM)
    assert abs((first * second).mean().item()) < limit
    for distance in (1, 2, 3, 4, 8):
        assert abs((first[distance:] * first[:-distance]).mean().item()) < limit


def test_scale_is_exact_for_the_rounded_rate() -> None:
    torch.manual_seed(0)
    x = torch.randn(257, 33, dtype=torch.float64)
    y = fast_dropout(x, 0.1)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - 6554 / 65536), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradient_goes_through_the_same_mask_and_scale(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(63, 17).to(dtype).requires_grad_()
    y = fast_dropout(x, 0.25)
    gradient = torch.randn(63, 17).to(dtype)
    y.backward(gradient)
    assert y.dtype == dtype and x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, gradient * (y != 0) * (1 / 0.75))


def test_same_seed_same_mask_and_another_seed_another() -> None:
    masks = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        masks.append(fast_dropout(torch.ones(1000), 0.5))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_rng_state_alone_decides_the_mask() -> None:
    fast_dropout(torch.ones(10), 0.5)
    state = torch.get_rng_state()
    first = fast_dropout(torch.ones(1000), 0.5)
    torch.set_rng_state(state)
    assert torch.equal(fast_dropout(torch.ones(1000), 0.5), first)


def test_masks_are_the_same_on_every_platform() -> None:
    torch.manual_seed(0)
    assert draw_levels(torch.Size([2, 3])).tolist() == GOLDEN


def test_evaluation_and_zero_rate_are_the_identity() -> None:
    x = torch.randn(5)
    assert FastDropout(0.5).eval()(x) is x
    assert FastDropout(0.0)(x) is x


def test_empty_and_non_contiguous_inputs_work() -> None:
    assert fast_dropout(torch.empty(0, 4), 0.5).shape == (0, 4)
    x = torch.ones(64, 64).t()[::2]
    assert set(fast_dropout(x, 0.5).unique().tolist()) == {0.0, 2.0}


def test_every_dropout_of_a_model_is_replaced() -> None:
    import peft

    model = peft.get_peft_model(
        tiny_bert_model(), peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.2, target_modules=["query"])
    )
    before = {name: m.p for name, m in model.named_modules() if type(m) is nn.Dropout}
    use_fast_dropout(model)
    after = {name: m.p for name, m in model.named_modules() if isinstance(m, FastDropout)}
    assert before == after and any("lora_dropout" in name for name in after)
    assert not any(type(m) is nn.Dropout for m in model.modules())


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    layer = nn.Sequential(nn.Linear(8, 8), FastDropout(0.3), nn.Linear(8, 8), FastDropout(0.3))
    x = torch.randn(16, 8)
    gradients = []
    for run in (layer, lambda inputs: checkpoint(layer, inputs, use_reentrant=False)):
        torch.manual_seed(2)
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_model_with_checkpointing_has_the_same_gradient() -> None:
    gradients = []
    for use_checkpointing in (False, True):
        model = tiny_bert_model(FAST_ATTENTION)
        use_fast_dropout(model)
        if use_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        model.train()(**inputs()).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("build", ["bert", "gpt2"])
def test_fast_attention_without_dropout_is_sdpa(build: str) -> None:
    outputs = []
    for attention in ("sdpa", FAST_ATTENTION):
        model = BUILDERS[build](attention)
        for train in (False, True):
            no_dropout(model.train(train))
            outputs.append(model(**inputs()).logits)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@pytest.mark.parametrize("build", ["bert", "gpt2"])
def test_fast_attention_masks_padding_and_the_future(build: str) -> None:
    """With a rate that rounds to one dropped level in 65536, its own path must agree with sdpa to rounding."""
    outputs = []
    for attention, rate in (("sdpa", 0.0), (FAST_ATTENTION, 1 / LEVELS)):
        model = BUILDERS[build](attention).train()
        no_dropout(model, attention=rate)
        torch.manual_seed(11)
        outputs.append(model(**inputs()).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


def test_mean_output_of_fast_attention_is_that_of_sdpa_with_dropout() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 4) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5)
    mask[1, :, :, 3:] = torch.finfo(torch.float32).min
    module = nn.Module()
    runs = [fast_attention_forward(module, query, key, value, mask, dropout=0.2, scaling=0.5)[0] for _ in range(4000)]
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.5).transpose(1, 2)
    mean, sigma = torch.stack(runs).mean(0), torch.stack(runs).std(0) / math.sqrt(len(runs))
    assert ((mean - expected).abs() < 5 * sigma).all()


def inputs() -> dict[str, torch.Tensor]:
    """Three rows, two of them padded."""
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
    return {"input_ids": torch.arange(27).view(3, 9) % 20 + 1, "attention_mask": mask}


def no_dropout(model: nn.Module, *, attention: float = 0.0) -> None:
    """Set every rate to 0, that of attention probabilities to `attention`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = attention if name.endswith(("self.dropout", "attn_dropout")) else 0.0


def tiny_bert_model(attention: str = "sdpa") -> nn.Module:
    """Two layers of width 16."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return with_attention(BertForSequenceClassification(config), attention)


def tiny_gpt2_model(attention: str = "sdpa") -> nn.Module:
    """Two layers of width 16."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return with_attention(GPT2ForSequenceClassification(config), attention)


def with_attention(model: nn.Module, attention: str) -> nn.Module:
    """The model with this kernel."""
    model.set_attn_implementation(attention)
    return model


BUILDERS = {"bert": tiny_bert_model, "gpt2": tiny_gpt2_model}
GOLDEN = [[34, -26127, -3890], [12917, -22313, 1809]]
