"""Exported adapters: opened by plain PEFT and the reverse, merged, compared, and several of them on one base."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch.adapter import held_out_samples
from launch.cli import main
from tests.test_predict import LABELS, TEXTS, export_run
from tests.tiny import tiny_bert, tiny_sentences
from trainer.errors import CheckpointError, ConfigError
from trainer.model.adapters import Difference, compare, find_adapter, merge, merged
from trainer.model.export import identity_below, load_exported
from trainer.predict.adapters import AdapterPredictor
from trainer.predict.classify import load_predictor

PEFT_METHODS = ("lora", "dora", "rslora", "qlora", "vera", "ia3", "prompt", "p_tuning", "prefix")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_bert(folder / "base", hidden_size=64)
    return folder


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Path]:
    return {method: export_run(root / method, root / "base", method) for method in (*PEFT_METHODS, "adapter")}


def logits_of(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", [method for method in PEFT_METHODS if method != "qlora"])
def test_plain_peft_opens_an_exported_adapter_and_gives_equal_logits(
    method: str, root: Path, runs: dict[str, Path]
) -> None:
    from peft import PeftModel

    folder = runs[method] / "model"
    plain = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    theirs = logits_of(PeftModel.from_pretrained(plain, folder), folder)
    assert torch.equal(theirs, logits_of(load_exported(folder)[0], folder))


def test_an_adapter_made_by_plain_peft_opens_here(root: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    plain = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    theirs = get_peft_model(
        plain, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(root / "base").save_pretrained(tmp_path)
    info = {
        "task": "classification",
        "method": "lora",
        "base": str(root / "base"),
        "label_names": LABELS,
        "max_length": 12,
    }
    (tmp_path / "samestep.json").write_text(json.dumps(info))
    assert torch.equal(logits_of(theirs, tmp_path), logits_of(load_exported(tmp_path)[0], tmp_path))
    assert find_adapter(tmp_path)[1]["method"] == "lora"


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "vera", "ia3"])
def test_a_merged_model_opens_without_its_adapter_and_says_the_same(
    method: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder, info = find_adapter(runs[method])
    merge(folder, info, "base", tmp_path / "out")
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits_of(alone, folder), logits_of(load_exported(folder)[0], folder), atol=1e-5)
    assert load_predictor(tmp_path / "out").predict(TEXTS)[0].label in LABELS


def test_a_quantized_base_is_merged_as_the_adapter_knew_it_and_the_other_merge_is_told_apart(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder, info = find_adapter(runs["qlora"])
    model, tokenizer, _ = load_exported(folder)
    faithful = compare(model, merged(folder, info, "dequantized"), tokenizer, TEXTS)
    other = compare(model, merged(folder, info, "base"), tokenizer, TEXTS)
    assert faithful.verdict == "the same model, to rounding"
    assert faithful.max_logit_difference < 1e-4
    assert other.mean_kl > 10 * faithful.mean_kl
    assert other.max_logit_difference > 10 * faithful.max_logit_difference
    merge(folder, info, "dequantized", tmp_path / "out")
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits_of(alone, folder), logits_of(model, folder), atol=1e-4)


def test_the_comparison_is_that_of_the_formulas() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, **_: torch.Tensor) -> "Fixed":
            return self

    def tokenizer(*_: object, **__: object) -> dict[str, torch.Tensor]:
        return {}

    found = compare(Fixed([0.0, 1.0]), Fixed([1.0, 0.0]), tokenizer, ["any"])  # type: ignore[arg-type]
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert found.mean_kl == pytest.approx(float((p * np.log(p / p[::-1])).sum()))
    assert (found.top1_agreement, found.max_logit_difference) == (0.0, 1.0)
    assert found.verdict.startswith("ANOTHER MODEL")
    assert Difference(1, 1e-4, 1.0, 0.1).verdict.startswith("close")


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning", "adapter"])
def test_what_cannot_be_merged_is_refused(method: str, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"method {method} adds no weights.*cannot be merged"):
        merge(*find_adapter(runs[method]), "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_twenty_adapters_on_one_base_answer_as_each_alone(root: Path, tmp_path: Path) -> None:
    names = [f"a{number:02d}" for number in range(20)]
    for number, name in enumerate(names):
        torch.manual_seed(number)
        export_run(tmp_path / name, root / "base", "lora")
    together = AdapterPredictor({name: tmp_path / name for name in names})
    assert together.mixes
    requests = [(text, name) for text in TEXTS for name in names]
    answers = together.predict(requests, batch_size=16)
    for name in names:
        alone = load_predictor(tmp_path / name).predict(TEXTS)
        mine = [answer for (_, wanted), answer in zip(requests, answers, strict=True) if wanted == name]
        assert [one.label for one in mine] == [one.label for one in alone]
        assert [one.confidence for one in mine] == pytest.approx([one.confidence for one in alone], abs=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    base_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    adapter_bytes = sum((tmp_path / name / "model/adapter_model.safetensors").stat().st_size for name in names)
    assert together.num_bytes() <= base_bytes + adapter_bytes


def test_adapters_that_cannot_share_a_batch_take_turns(runs: dict[str, Path]) -> None:
    chosen = {name: runs[name] for name in ("rslora", "lora", "dora")}
    together = AdapterPredictor(chosen)
    assert not together.mixes
    requests = [(text, name) for text in TEXTS for name in chosen]
    answers = together.predict(requests)
    for name in chosen:
        alone = load_predictor(runs[name]).predict(TEXTS)
        mine = [answer.confidence for (_, wanted), answer in zip(requests, answers, strict=True) if wanted == name]
        assert mine == pytest.approx([one.confidence for one in alone], abs=1e-5)


def test_adapters_of_two_bases_are_refused(root: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    tiny_bert(tmp_path / "other")
    export_run(tmp_path / "stranger", tmp_path / "other", "lora")
    with pytest.raises(CheckpointError, match=r"stranger belongs to base .*; give adapters of one base"):
        AdapterPredictor({"lora": runs["lora"], "stranger": tmp_path / "stranger"})
    with pytest.raises(CheckpointError, match="bottleneck adapters take the place of layers"):
        AdapterPredictor({"lora": runs["lora"], "adapter": runs["adapter"]})
    with pytest.raises(CheckpointError, match=r"one kind on a base, not lora .lora., ia3 .ia3."):
        AdapterPredictor({"lora": runs["lora"], "ia3": runs["ia3"]})


def test_a_truncated_adapter_is_an_error_and_not_a_worse_model(root: Path, tmp_path: Path) -> None:
    run = export_run(tmp_path / "run", root / "base", "lora")
    file = run / "model/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="does not open"):
        load_exported(run / "model")


def test_an_adapter_on_another_base_than_its_own_is_an_error(root: Path, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "base", hidden_size=64)
    run = export_run(tmp_path / "run", tmp_path / "base", "lora")
    file = run / "model" / "samestep.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"base_identity": identity_below(load_exported(run / "model")[0])}))
    load_exported(run / "model")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match="trained on other weights than"):
        load_exported(run / "model")


def test_the_commands_list_inspect_compare_and_predict(
    runs: dict[str, Path], root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def say(*argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(argv))
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    assert "qlora" in say("adapter", "list", str(root))
    assert "quantized to nf4" in say("adapter", "inspect", str(runs["qlora"]))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    assert "to rounding" in say("adapter", "compare", str(runs["lora"]), "--text", str(texts))
    both = f"{runs['lora']},{runs['rslora']}"
    lines = say("predict", "--adapters", both, "a good film", "an awful film").splitlines()
    assert [line.split()[0] for line in lines] == ["lora", "rslora"] * 2
    tiny_sentences(tmp_path / "data.csv", rows=40)
    (runs["lora"] / "config.yaml").write_text(f"name: tiny\ndata:\n  source: {tmp_path / 'data.csv'}\n")
    rows = [line.split() for line in say("adapter", "evaluate", both).splitlines()]
    assert [row[0] for row in rows] == ["adapter", "lora", "rslora"]
    assert all(row[2] == "6" for row in rows[1:])
    predictor = load_predictor(runs["rslora"])
    texts, labels = held_out_samples(runs["lora"])
    answers = predictor.predict(texts)
    share = np.mean([answer.label == label for answer, label in zip(answers, labels, strict=True)])
    assert rows[2][1] == f"{share:.4f}"
    assert "opened again" in say("adapter", "merge", str(runs["lora"]), "--output", str(tmp_path / "merged"))
