"""Objectives on real ranks: the same losses on every backend, and after a kill on other ranks; small models of each architecture."""

from pathlib import Path
from typing import Any, cast

import pytest
from accelerate import Accelerator
from transformers import AlbertConfig, AutoTokenizer, BartConfig, BertConfig, PretrainedConfig, T5Config, XLNetConfig

from tests.distributed.resume_runs import metrics_of, start
from tests.tiny import tiny_tokens
from trainer.config import ModelConfig, OptimConfig, RunConfig, StreamData, TrainConfig
from trainer.config.data import TASK_OF_OBJECTIVE
from trainer.model.export import load_exported
from trainer.task import build_task

NUM_STEPS = 6
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS: dict[str, PretrainedConfig] = {
    "mlm": BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "mlm_nsp": BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "mlm_sop": AlbertConfig(embedding_size=16, **SMALL, classifier_dropout_prob=0.0),
    "span_corruption": T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.0
    ),
    "infilling": BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        dropout=0.0,
        max_position_embeddings=128,
    ),
    "plm": XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, dropout=0.0, use_mems_eval=False),
}
EACH = pytest.mark.parametrize("objective", list(MODELS))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    for objective, config in MODELS.items():
        config.save_pretrained(folder / objective)
    tiny_tokens(folder / "tokens", 120)
    tiny_tokens(folder / "held-out", 20, seed=1)
    return folder


def make_config(root: Path, run: Path, objective: str) -> RunConfig:
    return RunConfig(
        name="objective",
        run_dir=run,
        model=ModelConfig(source=str(root / objective), task=TASK_OF_OBJECTIVE[objective], init="random"),  # type: ignore[arg-type]
        data=StreamData(
            objective=objective,  # type: ignore[arg-type]
            sources=(str(root / "tokens"),),
            validation=str(root / "held-out"),
            sequence_length=48,
            packing="best_fit",
            isolate=False,
            max_epochs=9,
            cache=root / "cache",
        ),
        optim=OptimConfig(peak_lr=3e-3),
        train=TrainConfig(
            max_steps=NUM_STEPS, global_batch_size=12, log_every=1, save_every=2, eval_every=3, metric="loss"
        ),
    )


_whole: dict[tuple[Path, str], Path] = {}


def never_killed(root: Path, objective: str) -> Path:
    """The run directory of the uninterrupted run on one process."""
    if (root, objective) not in _whole:
        config = make_config(root, root / f"whole-{objective}", objective)
        seen = start(config, "single", 1)
        assert seen is not None
        assert seen[0]["error"] is None
        _whole[root, objective] = config.folder
    return _whole[root, objective]


def assert_same_curve(run: Path, whole: Path) -> None:
    """Every logged number of training and validation within 1e-5."""
    one, two = metrics_of(run), metrics_of(whole)
    assert len(one) == len(two) > NUM_STEPS
    for line, expected in zip(one, two, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-7)


def run_on(root: Path, tmp_path: Path, objective: str, backend: str) -> Path:
    """The run directory of the same run on two ranks."""
    config = make_config(root, tmp_path / "run", objective)
    seen = start(config, backend, 2)
    assert seen is not None
    assert [facts["error"] for facts in seen] == [None, None]
    return config.folder


@EACH
def test_two_sharded_ranks_learn_what_one_process_learns(objective: str, root: Path, tmp_path: Path) -> None:
    assert_same_curve(run_on(root, tmp_path, objective, "fsdp"), never_killed(root, objective))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
@EACH
def test_other_backends_do_so_too(objective: str, backend: str, root: Path, tmp_path: Path) -> None:
    assert_same_curve(run_on(root, tmp_path, objective, backend), never_killed(root, objective))


@pytest.mark.slow
@EACH
def test_killed_and_resumed_on_other_ranks(objective: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", objective)
    # In the sixth step: the save after the fourth begins only once that after the second is whole.
    assert start(config, "ddp", 2, fault="step@1:6") is None
    seen = start(config, "fsdp", 3)
    assert seen is not None
    assert [facts["error"] for facts in seen] == [None] * 3
    assert sorted(seen[0]["losses"])[0] > 0
    assert_same_curve(config.folder, never_killed(root, objective))


@EACH
def test_the_run_leaves_a_model_with_its_special_tokens_and_samples(objective: str, root: Path) -> None:
    whole = never_killed(root, objective)
    model, tokenizer, info = load_exported(whole / "model")
    assert info["objective"] == objective
    assert model.config.vocab_size == len(tokenizer) > 61
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    if objective == "span_corruption":
        assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == len(tokenizer) - 1
        assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    if objective.startswith("mlm"):
        assert tokenizer.mask_token == "<mask>"
    text, end = tokenizer("w1 w2", add_special_tokens=False)["input_ids"], [tokenizer.sep_token_id]
    start = [tokenizer.cls_token_id]
    framed = {"span_corruption": text + end, "plm": text + end + start}.get(objective, start + text + end)
    for one in (tokenizer, AutoTokenizer.from_pretrained(whole / "model")):
        assert one("w1 w2")["input_ids"] == framed  # as every row of the training had it
    lines = metrics_of(whole)
    wanted: set[str] = {"eval/loss", "eval/perplexity", "eval/accuracy"}
    assert wanted | ({"eval/pair_accuracy"} if objective in ("mlm_nsp", "mlm_sop") else set()) <= lines[-1].keys()
    assert {"train/loss", "train/accuracy"} <= lines[0].keys()
    task = cast(Any, build_task(make_config(root, whole, objective), Accelerator(cpu=True)))
    first = task.training_batch(task.global_batch(0))
    assert lines[0]["train/padding"] == pytest.approx(
        float((first["input_ids"] == tokenizer.pad_token_id).double().mean()), abs=1e-6
    )
    assert lines[-2]["eval/loss"] < lines[0]["train/loss"]
    assert (whole / "samples.txt").read_text().count("wanted: ") == 3
    files: set[Any] = {path.name for path in sorted((whole / "checkpoints").iterdir())[-1].iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    assert len(AutoTokenizer.from_pretrained(whole / "model")) == len(tokenizer)
