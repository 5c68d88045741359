"""Texts from texts as training: learned, the same by every method, exported, and answered at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from launch.preflight import load_recipe
from tests.distributed.resume_runs import same_weights, train
from tests.test_recipes import ROOT
from tests.tiny import tiny_bart, tiny_bert, tiny_llama, tiny_pairs, tiny_t5
from trainer.config import FullConfig, LoraConfig, ModelConfig, OptimConfig, PairData, RunConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.metrics import exact_match, rouge_1, rouge_2, rouge_l
from trainer.model.export import load_exported
from trainer.predict.answer import PredictOptions, open_answerer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5, a BART and pairs of one target."""
    folder = tmp_path_factory.mktemp("seq2seq")
    tiny_t5(folder / "t5")
    tiny_bart(folder / "bart")
    tiny_pairs(folder / "pairs.jsonl")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    same = [json.dumps(row | {"target": "w7 w8 w9"}) for row in rows]
    (folder / "same.jsonl").write_text("\n".join(same) + "\n")
    return folder


def run_config(root: Path, run: Path, source: str = "t5", **changes: Any) -> RunConfig:
    train = {"max_steps": 40, "global_batch_size": 8, "metric": "loss", "eval_every": 20, "save_every": 20}
    pairs = {
        "source": str(root / "same.jsonl"),
        "max_length": 20,
        "max_target_length": 8,
        "new_tokens": 6,
        "validation_fraction": 0.2,
    }
    return RunConfig(
        name="seq2seq",
        run_dir=run,
        model=ModelConfig(source=str(root / source), task="seq2seq"),
        method=changes.get("method", FullConfig()),
        data=PairData(**(pairs | changes.get("data", {}))),
        optim=OptimConfig(peak_lr=changes.get("peak_lr", 1e-2)),
        train=TrainConfig(**(train | changes.get("train", {}))),
    )


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=8)], ids=["full", "lora"])
@pytest.mark.parametrize("source", ["t5", "bart"])
def test_a_run_learns_is_exported_and_answers(
    source: str, method: FullConfig | LoraConfig, root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rate = 1e-2 if isinstance(method, FullConfig) else 5e-2
    facts = train(run_config(root, run, source, method=method, peak_lr=rate, data={"prefix": "w1 "}))
    assert facts["error"] is None
    evaluated = [line["eval/loss"] for line in lines_of(run) if "eval/loss" in line]
    assert evaluated[-1] < evaluated[0]
    last = lines_of(run)[-1]
    assert last["eval/loss"] < (
        0.1 if isinstance(method, FullConfig) else 4.0
    )  # frozen random embeddings keep logits small
    assert last["eval/count"] == 16 * (4 if source == "t5" else 5)
    assert last["eval/generated"] == 16
    report = (run / "samples.txt").read_text()
    assert report.count("[answer]") == report.count("[target] w7 w8 w9") == 3
    if isinstance(method, FullConfig):
        assert [last[f"eval/{name}"] for name in ("stop_rate", "exact_match", "rouge_1", "rouge_2", "rouge_l")] == [
            1
        ] * 5
        opened = AutoModelForSeq2SeqLM.from_pretrained(run / "model")
        assert opened.get_input_embeddings().weight is opened.get_output_embeddings().weight
    check_answers(run, report, last)


def check_answers(run: Path, report: str, last: dict[str, Any]) -> None:
    """Prediction from the exported folder says what the run's own report says."""
    model, tokenizer, info = load_exported(run / "model")
    assert (info["task"], info["max_length"], info["prefix"]) == ("seq2seq", 20, "w1 ")
    assert AutoTokenizer.from_pretrained(run / "model").get_vocab() == tokenizer.get_vocab()
    told = [sample.splitlines() for sample in report.split("\n\n")]
    texts = [lines[0].removeprefix("w1 ") for lines in told]
    answerer = open_answerer(info["task"], model, tokenizer, info, PredictOptions(new_tokens=6))
    assert [f"[answer] {answer.facts['generated']}".strip() for answer in answerer.answer(texts)] == [
        lines[1].strip() for lines in told
    ]


def test_a_stopped_run_goes_on_to_the_same_weights(root: Path, tmp_path: Path) -> None:
    """With dropout, from a checkpoint of the middle."""
    tiny_t5(tmp_path / "t5", dropout=0.1)

    def config(run: str, **train: Any) -> RunConfig:
        steps = {"max_steps": 6, "save_every": 2, "eval_every": 6} | train
        plain = run_config(root, tmp_path / run, data={"generate": 0}, train=steps)
        return plain.model_copy(update={"model": ModelConfig(source=str(tmp_path / "t5"), task="seq2seq")})

    whole = train(config("whole"))
    monkey = pytest.MonkeyPatch()
    monkey.setenv("SAMESTEP_FAULT", "step@0:3:usr1")
    try:
        assert train(config("again"))["error"] is None
    finally:
        monkey.undo()
    resumed = train(config("again"))
    assert (whole["error"], resumed["error"]) == (None, None)
    assert sorted(resumed["losses"]) == [3, 4, 5]
    assert same_weights(resumed, whole)


def test_micro_batches_do_not_change_the_step(root: Path, tmp_path: Path) -> None:
    """However differently many targets they hold; the pairs of this file differ in length."""
    losses = []
    for micro in (None, 3):
        rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
        unlike = [row | {"target": " ".join(row["text"].split()[:6])} for row in rows]
        (tmp_path / "unlike.jsonl").write_text("\n".join(map(json.dumps, unlike)) + "\n")
        steps = {"max_steps": 3, "micro_batch_size": micro}
        config = run_config(
            root, tmp_path / f"{micro}", data={"source": str(tmp_path / "unlike.jsonl"), "generate": 0}, train=steps
        )
        losses.append(list(train(config)["losses"].values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert max(losses[0]) - min(losses[0]) > 1e-3


def test_the_recipe_trains_on_the_standard_library(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.data.test_pairs import docstring_file_of

    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    docstring_file_of(tmp_path / "cache", [(f"w{number} w{number}", f"w{number} w3\n\nMore.") for number in range(40)])
    tiny_t5(tmp_path / "runs" / "pretrain_t5" / "model")
    recipe = load_recipe(ROOT / "recipes" / "summarize.py")
    few = recipe.DEFAULTS.train.model_copy(update={"max_steps": 2})
    recipe.main(recipe.DEFAULTS.model_copy(update={"train": few}))
    last = lines_of(tmp_path / "runs" / "summarize")[-1]
    assert last["eval/generated"] == last["eval/count"] / 3 == 2
    assert 0 <= last["eval/rouge_1"] <= 1


# What is refused


def problem_of(config: RunConfig) -> str:
    facts = train(config)
    assert facts["error"] is not None
    return str(facts["error"])


def test_lengths_beyond_the_models_positions_are_refused(root: Path, tmp_path: Path) -> None:
    for name, value in (("max_length", 100), ("max_target_length", 65), ("new_tokens", 99)):
        said = problem_of(run_config(root, tmp_path, "bart", data={name: value}))
        assert f"data.{name} ({value}) must be at most 64, the positions of model.source" in said


def test_a_model_that_does_not_say_how_its_decoder_begins_is_refused(root: Path, tmp_path: Path) -> None:
    tiny_t5(tmp_path / "t5")
    settings = json.loads((tmp_path / "t5" / "config.json").read_text())
    del settings["decoder_start_token_id"]
    (tmp_path / "t5" / "config.json").write_text(json.dumps(settings))
    config = run_config(root, tmp_path / "run")
    said = problem_of(config.model_copy(update={"model": ModelConfig(source=str(tmp_path / "t5"), task="seq2seq")}))
    assert "its config.json names no decoder_start_token_id, with which a decoder begins" in said


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_a_model_without_a_decoder_of_its_own_is_refused(make: Any, root: Path, tmp_path: Path) -> None:
    from trainer.model.methods import check_method

    make(tmp_path / "model")
    config = run_config(root, tmp_path / "run")
    config = config.model_copy(update={"model": ModelConfig(source=str(tmp_path / "model"), task="seq2seq")})
    with pytest.raises(ConfigError, match=r"model\.task \(seq2seq\): .* which cannot do it"):
        check_method(config)


def test_other_data_and_metrics_do_not_fit_the_task() -> None:
    plain = {
        "name": "x",
        "model": {"task": "seq2seq"},
        "data": {"kind": "pairs"},
        "train": {"max_steps": 1, "metric": "loss"},
    }
    assert RunConfig(**plain).data.kind == "pairs"
    with pytest.raises(
        ValueError, match=r"model\.task \(clm\) learns from data\.kind=stream or live or instruct, not from pairs"
    ):
        RunConfig(**plain | {"model": {"task": "clm"}})
    with pytest.raises(ValueError, match=r"train\.metric \(f1\) must be one of loss for model\.task=seq2seq"):
        RunConfig(**plain | {"train": {"max_steps": 1, "metric": "f1"}})


# Scores


@pytest.mark.parametrize(
    ("answer", "reference", "one", "two", "longest"),
    [
        ("the cat sat", "The cat sat.", 1.0, 1.0, 1.0),
        ("the cat", "the cat sat down", 2 * 2 / 6, 2 * 1 / 4, 2 * 2 / 6),
        ("sat the cat", "the cat sat", 1.0, 2 * 1 / 4, 2 * 2 / 6),
        ("the the the", "the cat the", 2 * 2 / 6, 0.0, 2 * 2 / 6),
        ("a", "a", 1.0, 0.0, 1.0),
        ("", "a", 0.0, 0.0, 0.0),
        ("a b", "c d", 0.0, 0.0, 0.0),
    ],
)
def test_rouge_by_hand(answer: str, reference: str, one: float, two: float, longest: float) -> None:
    assert rouge_1(answer, reference) == pytest.approx(one)
    assert rouge_2(answer, reference) == pytest.approx(two)
    assert rouge_l(answer, reference) == pytest.approx(longest)
    assert exact_match(answer, reference) == float(answer == reference)


def test_no_answer_is_asked_for_where_generate_is_zero(root: Path, tmp_path: Path) -> None:
    facts = train(run_config(root, tmp_path / "run", data={"generate": 0}, train={"max_steps": 1}))
    assert facts["error"] is None
    assert not any("rouge" in name for name in lines_of(tmp_path / "run")[-1])
