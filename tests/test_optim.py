"""The learning rate is a pure function of the step and agrees with transformers; the groups hold what they say."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from trainer.backend.pieces import read_own_steps, read_steps, with_moments, write_steps
from trainer.config import FullConfig, HeadConfig, LoraConfig, OptimConfig, RunConfig, TrainConfig
from trainer.model.methods import apply_method
from trainer.optim import build_optimizer, count_steps, lr_at, parameter_groups, peak_lr

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PADDED = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
ARCHITECTURES = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL),
    "distilbert": DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32),
    "gpt2": GPT2Config(n_embd=16, n_layer=3, n_head=2, **PADDED),
    "llama": LlamaConfig(num_key_value_heads=2, **SMALL, **PADDED),
}
BLOCKS = {
    "bert": "encoder.layer",
    "roberta": "encoder.layer",
    "distilbert": "transformer.layer",
    "gpt2": "h",
    "llama": "layers",
}


@pytest.mark.parametrize(
    ("schedule", "peer"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize(("total", "fraction"), [(100, 0.1), (30, 0.1), (7, 0.5), (50, 0.06)])
def test_schedule_is_transformers_one_step_ahead(schedule: Any, peer: Any, total: int, fraction: float) -> None:
    warmup = round(total * fraction + 0.4999)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = peer(optimizer, warmup, total)
    for step in range(total):
        optimizer.step()
        scheduler.step()  # transformers' value for step + 1
        expected = scheduler.get_last_lr()[0]
        assert rate(step, total_steps=total, schedule=schedule, warmup_fraction=fraction) == pytest.approx(
            expected, abs=1e-15
        )


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 110), (1.101, 111), (2, 200), (0.001, 1), (1e-12, 1)])
def test_a_part_of_an_epoch_has_its_share_of_the_steps_rounded_up(epochs: float, steps: int) -> None:
    assert count_steps(TrainConfig(num_epochs=epochs), 100) == steps


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warmup_rises_linearly_from_the_first_step_to_the_peak(schedule: str) -> None:
    rates = [rate(step, total_steps=40, schedule=schedule, warmup_fraction=0.1) for step in range(40)]
    assert rates[:4] == pytest.approx([3e-4 / 4, 3e-4 / 2, 3e-4 * 3 / 4, 3e-4])
    assert max(rates) == 3e-4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_last_step_is_at_the_floor_and_no_step_rises_after_the_peak(schedule: str, floor: float) -> None:
    for warmup in (0.0, 0.2):
        rates = [
            rate(step, total_steps=20, schedule=schedule, warmup_fraction=warmup, min_lr_fraction=floor)
            for step in range(20)
        ]
        assert rates[-1] == pytest.approx(3e-4 * floor, abs=1e-18)
        peak = rates.index(max(rates))
        assert rates[peak] == 3e-4 and all(a > b for a, b in pairwise(rates[peak:]))


def test_constant_stays_at_the_peak() -> None:
    assert {rate(step, total_steps=9, schedule="constant", warmup_fraction=0.0) for step in range(9)} == {3e-4}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_a_run_of_one_step_trains_at_the_peak(schedule: str, warmup: float) -> None:
    assert rate(0, total_steps=1, schedule=schedule, warmup_fraction=warmup) == 3e-4


def test_peak_defaults_follow_the_method() -> None:
    peaks = [peak_lr(RunConfig(name="x", method=method)) for method in (FullConfig(), HeadConfig(), LoraConfig())]
    assert peaks == [2e-5, 1e-3, 3e-4]
    assert peak_lr(RunConfig(name="x", optim=OptimConfig(peak_lr=0.5))) == 0.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_biases_norms_and_embeddings_do_not_decay_and_matrices_do(name: str) -> None:
    decay = {n: g["weight_decay"] for g in groups(ARCHITECTURES[name]) for n in g["names"]}
    without = [n for n, value in decay.items() if value == 0]
    assert sorted(without) == sorted(n for n in decay if n.endswith("bias") or "norm" in n.lower() or is_special(n))
    assert set(decay.values()) == {0.0, 0.01}


@pytest.mark.parametrize("method", [FullConfig(), HeadConfig(), LoraConfig(rank=2)])
def test_every_trainable_parameter_is_in_exactly_one_group(method: Any) -> None:
    model = build(ARCHITECTURES["bert"], method)
    found = [id(p) for g in parameter_groups(model, RunConfig(name="x", method=method)) for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=2)])
def test_layer_decay_falls_from_head_to_embeddings(name: str, method: Any) -> None:
    factors = {n: g["lr_factor"] for g in groups(ARCHITECTURES[name], method, layer_decay=0.5) for n in g["names"]}
    for block, expected in enumerate((0.125, 0.25, 0.5)):
        inside = {value for n, value in factors.items() if f"{BLOCKS[name]}.{block}." in n}
        assert inside == {expected}
    rest = {n: value for n, value in factors.items() if f"{BLOCKS[name]}." not in n}
    assert {v for n, v in rest.items() if is_embedding(n)} <= {0.0625}
    assert {v for n, v in rest.items() if not is_embedding(n)} == {1.0}


STACKS = {
    "t5": (T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=50), "block"),
    "bart": (
        BartConfig(d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                   encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, vocab_size=50),
        "layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=2)])
def test_layer_decay_falls_from_the_top_of_each_of_two_stacks(name: str, method: Any) -> None:
    architecture, blocks = STACKS[name]
    with torch.device("meta"):
        model = apply_method(AutoModelForSeq2SeqLM.from_config(architecture), method, task="seq2seq")
    optim = OptimConfig(layer_decay=0.5, weight_decay=0.1)
    found = parameter_groups(model, RunConfig(name="x", method=method, optim=optim))
    factors = {n: g["lr_factor"] for g in found for n in g["names"]}
    assert sorted(factors) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    top = {"t5": 0.5, "bart": 1.0}[name]  # BART has nothing above its blocks but tied embeddings
    for stack, expected in {"encoder": (top / 4, top / 2, top), "decoder": (top / 2, top)}.items():
        for block, factor in enumerate(expected):
            inside = {value for n, value in factors.items() if f"{stack}.{blocks}.{block}." in n}
            assert inside == {factor}, (stack, block)
    if isinstance(method, FullConfig):
        rest = {n: value for n, value in factors.items() if f".{blocks}." not in n and "shared" not in n}
        assert {n: v for n, v in rest.items() if v != (top / 8 if "embed" in n else 1.0)} == {}
        assert len(rest) == {"t5": 2, "bart": 6}[name]
        decay = {n for g in found for n in g["names"] if g["weight_decay"] == 0}
        assert decay == {
            n for n in factors if n.endswith("bias") or "norm" in n or "embed" in n or "shared" in n or "relative" in n
        }


def test_model_without_repeated_blocks_still_gets_groups() -> None:
    config = AlbertConfig(embedding_size=8, **SMALL)
    assert sum(len(g["names"]) for g in groups(config, layer_decay=0.5)) == len(list(build(config).parameters()))


@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=2)])
def test_head_has_its_own_rate(method: Any) -> None:
    for group in groups(ARCHITECTURES["roberta"], method, peak_lr=1e-3, head_lr=5e-3):
        is_head = all("classifier" in name for name in group["names"])
        assert group["lr_factor"] == pytest.approx(5.0 if is_head else 1.0)
        assert group["lr"] == pytest.approx(5e-3 if is_head else 1e-3)
        assert is_head or not any("classifier" in name for name in group["names"])


def test_betas_and_epsilon_reach_the_optimizer() -> None:
    config = RunConfig(name="x", optim=OptimConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3))
    optimizer = build_optimizer(build(ARCHITECTURES["bert"]), config, fused=False)
    assert all(g["betas"] == (0.8, 0.95) and g["eps"] == 1e-6 for g in optimizer.param_groups)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.3}


def test_fused_adamw_takes_the_same_step_on_cpu() -> None:
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(ARCHITECTURES["bert"])
        optimizer = build_optimizer(model, RunConfig(name="x"), fused=fused)
        for _ in range(3):
            model.eval()(input_ids=torch.arange(8).view(2, 4)).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


def rate(step: int, **settings: Any) -> float:
    """lr_at with a peak of 3e-4."""
    return lr_at(step, **{"peak": 3e-4, "min_lr_fraction": 0.0, **settings})


def test_steps_are_counted_where_a_loss_does_not_reach_all_parameters() -> None:
    """As XLNet's mask_emb in classification: AdamW passes it over, and a resumed run has counted it before."""
    reached, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([reached, other])
    for parameter in (reached, other):
        with_moments(parameter, optimizer)
    named = [("reached", reached), ("other", other)]
    write_steps(optimizer, named, 3, {})
    for _ in range(2):
        reached.grad = torch.ones(2)
        optimizer.step()
    assert read_steps(optimizer) == 5
    assert read_own_steps(optimizer, named) == {"other": 3}
    write_steps(optimizer, named, 7, {"other": 3})
    assert [int(optimizer.state[parameter]["step"]) for parameter in (reached, other)] == [7, 3]


def build(architecture: PretrainedConfig, method: Any = FullConfig()) -> torch.nn.Module:  # noqa: B008 (frozen)
    """The model on the meta device with its method applied."""
    with torch.device("meta"):
        return apply_method(AutoModelForSequenceClassification.from_config(architecture), method)


def groups(architecture: PretrainedConfig, method: Any = FullConfig(), **optim: Any) -> list[dict[str, Any]]:  # noqa: B008
    """Parameter groups of a model on the meta device."""
    return parameter_groups(build(architecture, method), RunConfig(name="x", method=method, optim=OptimConfig(**optim)))


def is_special(name: str) -> bool:
    """GPT-2 calls its norms ln_; all call their embeddings one of these."""
    return "ln_" in name or is_embedding(name)


def is_embedding(name: str) -> bool:
    """Whether the parameter belongs to the embeddings."""
    return any(part in name for part in ("embeddings.", "embed_tokens", "wte", "wpe"))
