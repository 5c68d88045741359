"""What an objective asks of model and tokenizer, refused before anything loads, with the fix."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GPT2Config, T5Config, XLNetConfig

from tests.tiny import tiny_bert, tiny_llama, tiny_tokens
from trainer.config import ModelConfig, RunConfig, StreamData, TrainConfig
from trainer.config.data import TASK_OF_OBJECTIVE
from trainer.errors import ConfigError
from trainer.model.architecture import can_do
from trainer.resolve.inputs import input_problems


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    tiny_llama(folder / "llama")
    tiny_bert(folder / "bert")
    T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(folder / "t5")
    XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16).save_pretrained(folder / "xlnet")
    tiny_tokens(folder / "tokens", 60)
    return folder


def problems(root: Path, model: str, objective: str, *, init: str = "random", **data: Any) -> str:
    settings: dict[str, Any] = {"sequence_length": 48, "max_epochs": 9, "isolate": False} | data
    config = RunConfig(
        name="refused",
        model=ModelConfig(source=str(root / model), task=TASK_OF_OBJECTIVE[objective], init=init),  # type: ignore[arg-type]
        data=StreamData(
            objective=objective,  # type: ignore[arg-type]
            sources=(str(root / "tokens"),),
            validation=str(root / "tokens"),
            **settings,
        ),
        train=TrainConfig(max_steps=2, global_batch_size=4, metric="loss"),
    )
    return "\n".join(input_problems(config))


@pytest.mark.parametrize(
    ("model", "objective", "settings", "words"),
    [
        (
            "llama",
            "mlm",
            {},
            "model.task .mlm.: .* is of kind llama, which cannot do it; .* one of classification, .*clm",
        ),
        ("llama", "plm", {}, "model.task .plm.: .* is of kind llama"),
        ("llama", "span_corruption", {}, "model.task .seq2seq.: .* is of kind llama"),
        ("t5", "mlm_nsp", {}, "model.task .mlm_pairs.: .* is of kind t5"),
        (
            "t5",
            "span_corruption",
            {"sequence_length": 300, "packing": "concat", "noise_fraction": 0.45, "mean_span": 1.0},
            r"data.sequence_length \(300\) has 135 spans of noise, and the tokenizer 100 sentinels; lower it",
        ),
        (
            "bert",
            "mlm",
            {"init": "pretrained"},
            "another tokenizer than the one that made data.sources; .*samestep data tokenize",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_the_fix(
    root: Path, model: str, objective: str, settings: dict[str, Any], words: str
) -> None:
    assert re.search(words, problems(root, model, objective, **settings)), problems(root, model, objective, **settings)


@pytest.mark.parametrize(
    ("model", "objective", "length", "enough"),
    [("bert", "mlm", 3, 4), ("bert", "mlm_nsp", 4, 5), ("t5", "span_corruption", 2, 3), ("xlnet", "plm", 2, 4)],
)
def test_rows_too_short_for_any_text_are_refused(
    root: Path, model: str, objective: str, length: int, enough: int
) -> None:
    found = problems(root, model, objective, sequence_length=length, packing="concat")
    assert re.search(rf"data.sequence_length \({length}\) leaves .* set it to {enough} or more", found), found
    assert "leaves" not in problems(root, model, objective, sequence_length=enough, packing="concat")


def test_the_token_between_documents_is_special_by_any_name(root: Path) -> None:
    from trainer.model.vocabulary import objective_vocabulary

    file, data = root / "tokens" / "tokenizer.json", StreamData(objective="mlm", isolate=False)
    model = ModelConfig(source=str(root / "bert"), task="mlm", init="random")
    plain, known = (objective_vocabulary(model, data, file, eos)[2] for eos in (None, 17))
    assert known.is_special[17] and known.ends_sentence[17] and not plain.is_special[17]


def test_what_fits_is_not_refused(root: Path) -> None:
    assert problems(root, "bert", "mlm") == problems(root, "t5", "span_corruption") == ""


def test_a_pretrained_model_without_the_special_token_is_refused(root: Path, tmp_path: Path) -> None:
    """A causal model's tokenizer, whose vocabulary the data has, has no mask token."""
    from transformers import PreTrainedTokenizerFast

    from trainer.model.vocabulary import objective_vocabulary

    file = root / "tokens" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<end>", eos_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    model = ModelConfig(source=str(tmp_path), task="mlm")
    with pytest.raises(
        ConfigError, match=r"data.objective .mlm. needs a start token and a mask token, .* has none; take a model"
    ):
        objective_vocabulary(model, StreamData(objective="mlm", isolate=False), file, None)
    with pytest.raises(ConfigError, match="needs a sentinel token"):
        objective_vocabulary(model, StreamData(objective="span_corruption", isolate=False), file, None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"isolate": True}, "isolate .true. works with objective=clm only"),
        ({"noise_fraction": 1.0}, "noise_fraction"),
        ({"mean_span": 0.5}, "mean_span"),
        (
            {"objective": "infilling", "noise_fraction": 0.5},
            r"noise_fraction \(0.5\) must be at most 0.4 for objective=infilling",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StreamData(**({"objective": "mlm", "isolate": False} | changed))


def test_an_objective_for_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.objective \(mlm\) needs model.task=mlm, not clm"):
        RunConfig(
            name="x",
            model=ModelConfig(task="clm"),
            data=StreamData(objective="mlm", isolate=False),
            train=TrainConfig(max_steps=1, metric="loss"),
        )


def test_which_architectures_can_do_what() -> None:
    assert [can_do(task, XLNetConfig()) for task in ("plm", "clm", "mlm", "mlm_pairs")] == [True, True, False, False]
    assert [can_do(task, BertConfig()) for task in ("plm", "mlm", "mlm_pairs")] == [False, True, True]
    assert [can_do(task, GPT2Config()) for task in ("clm", "plm", "seq2seq")] == [True, False, False]
