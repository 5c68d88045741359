"""Several adapters on one base: each request's answer is that of its adapter alone, and the base is in memory once."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.exported_runs import ADAPTER, command, export_clm, llama_base, varied
from tests.test_predict import TEXTS, export_run
from tests.tiny import tiny_bert
from trainer.errors import CheckpointError, DataError
from trainer.model.export import load_exported
from trainer.predict.adapters import AdapterGenerator, AdapterPredictor
from trainer.predict.answer import PredictOptions, open_answerer
from trainer.predict.classify import load_predictor

NUM_ADAPTERS = 20
MEASURE = """
import ctypes, gc, sys
from pathlib import Path

import psutil

from trainer.predict.adapters import AdapterPredictor

small, *runs = (Path(run) for run in sys.argv[1:])
AdapterPredictor({"small": small}).predict([("good", "small")])  # what is imported and allocated once


def resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


before = resident()
together = AdapterPredictor({run.name: run for run in runs})
print(resident() - before)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases `base` and `wide`, each with a run and 20 adapters of other weights, whose names hold a dot as samestep's own do."""
    folder = tmp_path_factory.mktemp("together")
    for name, size in (("base", 64), ("wide", 512)):
        run = export_run(folder / f"{name}-run", tiny_bert(folder / name, hidden_size=size), "lora")
        for number in range(NUM_ADAPTERS):
            varied(run, folder / f"{name}.{number}", number)
    return folder


def runs_on(root: Path, base: str) -> dict[str, Path]:
    return {f"{base}.{number}": root / f"{base}.{number}" for number in range(NUM_ADAPTERS)}


def test_twenty_different_adapters_answer_as_each_alone(root: Path) -> None:
    runs = runs_on(root, "base")
    together = AdapterPredictor(runs)
    assert together.mixes
    predictor = next(iter(together.predictors.values()))
    inputs = predictor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    rows = [(row, name) for name in runs for row in range(len(TEXTS))]
    mixed = {key: tensor[[row for row, _ in rows]] for key, tensor in inputs.items()}
    with torch.no_grad():
        logits = together.model(**mixed, adapter_names=[together.inner[name] for _, name in rows]).logits
        alone = {name: load_exported(run / "model")[0](**inputs).logits for name, run in runs.items()}
    for one, other in itertools.combinations(alone.values(), 2):
        assert (one - other).abs().max() > 1e-2
    for name, mine in zip(runs, logits.split(len(TEXTS)), strict=True):
        assert torch.allclose(mine, alone[name], atol=1e-5), name
    requests = [(text, name) for text in TEXTS for name in runs]
    answers = together.predict(requests, batch_size=16)
    expected = {name: alone[name].double().softmax(-1).max(-1).values.tolist() for name in runs}
    for (text, name), answer in zip(requests, answers, strict=True):
        assert answer.confidence == pytest.approx(expected[name][TEXTS.index(text)], abs=1e-5)  # type: ignore[union-attr]


def test_twenty_adapters_take_the_memory_of_one_base(root: Path) -> None:
    runs = runs_on(root, "wide")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root / "base-run"), *map(str, runs.values())],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    base = (root / "wide" / "model.safetensors").stat().st_size
    adapters = sum((run / "model/adapter_model.safetensors").stat().st_size for run in runs.values())
    assert base > 16e6
    assert (
        base < int(done.stdout.split()[-1]) <= base + adapters + 12e6
    )  # of the process, which allocates beside tensors
    one = sum(tensor.nbytes for tensor in load_file(runs["wide.0"] / "model" / ADAPTER).values())
    alone = AdapterPredictor({"wide.0": runs["wide.0"]}).num_bytes()
    assert alone < base + 2 * one  # PEFT keeps the head that the base was given
    assert AdapterPredictor(runs).num_bytes() == alone + (NUM_ADAPTERS - 1) * one


def test_adapters_that_cannot_share_a_batch_take_turns(root: Path) -> None:
    runs = {"base.1": root / "base.1"}
    for method in ("rslora", "dora"):
        runs[method] = export_run(root / method, root / "base", method)
    together = AdapterPredictor(runs)
    assert not together.mixes
    requests = [(text, name) for text in TEXTS for name in runs]
    answers = together.predict(requests)
    for name in runs:
        alone = load_predictor(runs[name]).predict(TEXTS)
        mine = [answer.confidence for (_, wanted), answer in zip(requests, answers, strict=True) if wanted == name]  # type: ignore[union-attr]
        assert mine == pytest.approx([one.confidence for one in alone], abs=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("first", [2, 3])
def test_classifiers_with_other_numbers_of_labels_take_turns(first: int, root: Path, tmp_path: Path) -> None:
    three = export_run(tmp_path / "three", root / "base", "lora", ("bad", "good", "neither"))
    score = export_run(tmp_path / "score", root / "base", "lora", ("score",), target="regression")
    runs = {"base.1": root / "base.1", "three": three, "score": score}
    together = AdapterPredictor(runs if first == 2 else dict(reversed(runs.items())), torch.device("cpu"))
    assert not together.mixes
    answers = iter(together.predict([(text, name) for name in runs for text in TEXTS]))
    for folder in runs.values():
        alone = load_predictor(folder, torch.device("cpu")).predict(TEXTS)
        assert [list(next(answers).facts().values())[-1] for _ in TEXTS] == [
            pytest.approx(list(one.facts().values())[-1], abs=1e-5) for one in alone
        ]


def test_an_adapter_for_pairs_answers_pairs_beside_one_for_texts(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = export_run(tmp_path / "pairs", root / "base", "lora", pairs=True)
    chosen, file = f"{pairs},{root / 'base.1'}", tmp_path / "requests.jsonl"
    asked: list[dict[str, str]] = [
        {"text": "good", "text_pair": "awful", "adapter": "pairs"},
        {"text": "dull", "adapter": "base.1"},
    ]
    file.write_text("\n".join(map(json.dumps, asked)))
    capsys.readouterr()  # what the export said
    assert command("predict", "--adapters", chosen, "--file", file, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{key: row[key] for key in one} for one, row in zip(asked, rows, strict=True)] == asked
    alone = load_predictor(pairs).predict([("good", "awful")])[0]
    assert rows[0]["confidence"] == pytest.approx(alone.confidence, abs=1e-5)  # type: ignore[union-attr]
    assert command("predict", "--adapters", chosen, "dull") == 2
    assert 'must be a pair of texts like those of the training; write it as {"text"' in capsys.readouterr().err


def test_adapters_of_two_bases_or_kinds_are_refused(root: Path, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "other")
    lora = root / "base.0"
    export_run(tmp_path / "stranger", tmp_path / "other", "lora")
    with pytest.raises(CheckpointError, match=r"stranger belongs to base .*; give adapters of one base"):
        AdapterPredictor({"lora": lora, "stranger": tmp_path / "stranger"})
    for method in ("adapter", "ia3"):
        export_run(tmp_path / method, root / "base", method)
    with pytest.raises(CheckpointError, match="bottleneck adapters take the place of layers"):
        AdapterPredictor({"lora": lora, "adapter": tmp_path / "adapter"})
    with pytest.raises(CheckpointError, match=r"one kind on a base, not lora .lora., ia3 .ia3."):
        AdapterPredictor({"lora": lora, "ia3": tmp_path / "ia3"})


@pytest.mark.parametrize(
    ("method", "mixes", "how"),
    [
        ("qlora", True, {}),
        ("lora", True, {"temperature": 2.0, "seed": 3}),
        ("lora", True, {"num_beams": 3}),
        ("dora", False, {}),
        ("prefix", False, {}),
    ],
)
def test_each_adapter_writes_as_it_does_alone(method: str, mixes: bool, how: dict[str, Any], tmp_path: Path) -> None:
    settings = {"rank": 4} if method != "prefix" else {}
    run = export_clm(tmp_path / "a.0", llama_base(tmp_path / "llama"), {"name": method, **settings})
    runs = {"a.0": run, **{f"a.{seed}": varied(run, tmp_path / f"a.{seed}", seed, scale=1.0) for seed in (1, 2)}}
    options = PredictOptions(new_tokens=6, batch_size=4, **how)
    texts = ["w3 w4", "w9 w8 w7 w6", "w1"]
    together = AdapterGenerator(runs, options)
    assert together.mixes == mixes
    with pytest.raises(DataError, match=r"text 3 .* shorten the text"):
        together.answer([("w1", "a.0"), ("w1", "a.1"), ("w1 " * 200, "a.1")])
    together = AdapterGenerator(runs, options)  # sampling counts texts
    requests = [(text, name) for text in texts for name in runs]
    written = [answer.facts["generated"] for answer in together.answer(requests)]
    alone = {
        name: open_answerer("clm", *load_exported(path / "model"), options).answer(texts) for name, path in runs.items()
    }
    assert written == [alone[name][texts.index(text)].facts["generated"] for text, name in requests]
    assert len({tuple(answer.facts["generated"] for answer in answers) for answers in alone.values()}) > 1


def test_a_file_of_requests_names_the_adapter_of_each(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ",".join(str(root / f"base.{number}") for number in (3, 5))
    asked = [{"text": text, "adapter": f"base.{number}"} for text, number in zip(TEXTS, (5, 3, 3, 5), strict=True)]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)))
    assert command("predict", "--adapters", chosen, "--file", file, "--json", "--batch-size", 3) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{"text": row["text"], "adapter": row["adapter"]} for row in rows] == asked
    for row in rows:
        alone = load_predictor(root / row["adapter"]).predict([row["text"]])[0]
        assert row["confidence"] == pytest.approx(alone.confidence, abs=1e-5)  # type: ignore[union-attr]
    asked[1]["text"] = " "
    file.write_text("\n\n".join(map(json.dumps, asked)))
    for texts, number in (((), 3), (("good",), 3)):  # of the file; the second is its third line
        assert command("predict", "--adapters", chosen, *texts, "--file", file) == 2
        assert f"line {number} (' ') is empty" in capsys.readouterr().err
    file.write_text('{"text": "good", "adapter": "base.4"}')
    assert command("predict", "--adapters", chosen, "--file", file) == 2
    assert "adapter (base.4) must be one of base.3, base.5" in capsys.readouterr().err
