"""Prediction from real exported models: tiny encoders that were trained for a moment on good and bad words."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.cli import main
from launch.predict import predict_command
from tests.tiny import BAD, GOOD, tiny_bert
from trainer import run_folder
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.predict.classify import Predictor, load_predictor

ROOT = Path(__file__).parents[1]
LABELS = ("negative", "positive")
TEXTS = [
    "the film is good",
    "awful",
    "a story with actors and music is very very dull",
    "lovely music and a great film",
]
MAX_LENGTH = 12


def train_briefly(model: torch.nn.Module, tokenizer) -> None:
    """Enough steps for single words to be told apart."""
    model.eval()  # no dropout
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    inputs = tokenizer([*GOOD, *BAD], return_tensors="pt")
    labels = torch.tensor([1] * len(GOOD) + [0] * len(BAD))
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()


def export_run(folder: Path, base: Path, method: str, labels: tuple[str, ...] = LABELS, **info: object) -> Path:
    """A finished run's directory, by the toolkit's own model code; info: further entries of samestep.json."""
    from accelerate import Accelerator

    from trainer.config import RunConfig
    from trainer.model.export import export_model
    from trainer.model.identity import base_identity
    from trainer.model.load import build_model, load_tokenizer
    from trainer.model.methods import METHODS

    config = RunConfig(name="tiny", model={"source": str(base)}, method={"name": method})
    model = build_model(config, labels, Accelerator(cpu=True))
    identity = base_identity(model) if METHODS[method].is_adapter else None
    tokenizer = load_tokenizer(config.model)
    if len(labels) > 1:
        train_briefly(model, tokenizer)
    state = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad or method == "full"}
    info |= {"task": "classification", "method": method, "base": str(base)}
    info["base_identity"] = identity
    info["quantization"] = config.method.model_dump(include={"quantize", "double_quantization"}) or None
    folder.mkdir()
    (folder / "config.yaml").write_text("name: tiny\n")
    export_model(model, state, tokenizer, folder / "model", info | {"label_names": labels, "max_length": MAX_LENGTH})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def run(tmp_path_factory, base) -> Path:
    return export_run(tmp_path_factory.mktemp("runs") / "tiny", base, "lora")


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return load_predictor(run)


@pytest.fixture(scope="module")
def untrained(predictor) -> Predictor:
    """With large random weights, so that every text has a probability of its own; the trained ones are sure of all."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(predictor.tokenizer), initializer_range=0.3, **sizes)
    return Predictor(
        BertForSequenceClassification(config), predictor.tokenizer, label_names=LABELS, max_length=MAX_LENGTH
    )


def test_adapter_and_full_model_predict_what_they_were_trained_on(predictor, tmp_path, base):
    for one in (predictor, load_predictor(export_run(tmp_path / "full", base, "full"))):
        assert [each.label for each in one.predict(["good", "bad", "fine", "awful"])] == [
            "positive", "negative", "positive", "negative",
        ]  # fmt: skip


def test_bf16_is_the_same_to_its_rounding_and_refused_where_it_cannot_be(run, base, tmp_path, capsys):
    texts = ["good", "bad", "fine film", "awful film"]
    exact, rounded = (load_predictor(run, precision=precision).predict(texts) for precision in ("no", "bf16"))
    assert [one.label for one in rounded] == [one.label for one in exact]
    differences = [abs(one.confidence - two.confidence) for one, two in zip(exact, rounded, strict=True)]
    assert 0 < max(differences) < 0.02
    quantized = export_run(tmp_path / "qlora", base, "qlora")
    for words, message in (
        ((str(run), "good", "--precision", "fp16"), "--precision (fp16): must be no or bf16"),
        ((str(quantized), "good", "--precision", "bf16"), "base is quantized and keeps its own types"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["predict", *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_adapter_predicts_the_same_as_plain_peft_to_rounding(predictor, run, base):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    model = PeftModel.from_pretrained(plain, run / "model").eval()
    with torch.no_grad():
        logits = [model(**predictor.tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    expected = torch.stack(logits).double().softmax(-1).numpy()
    assert np.allclose([list(one.probabilities.values()) for one in predictor.predict(TEXTS)], expected, atol=1e-5)


def test_predictions_equal_a_one_at_a_time_loop_in_the_order_given(untrained):
    texts = TEXTS * 9
    expected = []
    for text in texts:
        inputs = untrained.tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        with torch.no_grad():
            expected.append(untrained.model(**inputs).logits.double().softmax(-1)[0].tolist())
    assert len({round(one[0], 4) for one in expected}) == len(TEXTS)  # so that a wrong order would be seen
    for batch_size in (1, 5, 64):
        got = untrained.predict(texts, batch_size)
        assert np.allclose([list(one.probabilities.values()) for one in got], expected, atol=1e-6)
        assert all(one.confidence == max(one.probabilities.values()) for one in got)
        assert all(one.probabilities[one.label] == one.confidence for one in got)
        assert sum(got[0].probabilities.values()) == pytest.approx(1.0)


def test_only_texts_beyond_the_models_length_are_cut(predictor):
    at_the_limit, beyond = "film " * (MAX_LENGTH - 2), "film " * (MAX_LENGTH - 1)
    assert [one.is_cut for one in predictor.predict([at_the_limit, beyond])] == [False, True]


def test_pairs_are_encoded_as_pairs(untrained):
    pair, single = untrained.predict([("good film", "bad film")]), untrained.predict(["good film bad film"])
    inputs = untrained.tokenizer("good film", "bad film", return_tensors="pt")
    assert inputs["token_type_ids"].sum() > 0
    with torch.no_grad():
        expected = untrained.model(**inputs).logits.double().softmax(-1)[0].tolist()
    assert list(pair[0].probabilities.values()) == pytest.approx(expected, abs=1e-6)
    assert pair[0].confidence != pytest.approx(single[0].confidence, abs=1e-4)


def test_no_texts_give_no_predictions(predictor):
    assert predictor.predict([]) == []


def test_an_empty_text_and_a_mixture_of_pairs_and_texts_are_named(predictor):
    with pytest.raises(DataError, match=r"text 2 \('  '\) is empty"):
        predictor.predict(["good", "  "])
    with pytest.raises(DataError, match=r"text 2 \('bad'\) must be a pair of texts like the first"):
        predictor.predict([("good", "film"), "bad"])


# Which folder


def test_run_model_folder_and_a_copy_of_it_all_open(run, tmp_path):
    copy = shutil.copytree(run / "model", tmp_path / "copy")
    assert run_folder.find_exported(run) == run_folder.find_exported(run / "model") == run / "model"
    assert load_predictor(copy).predict(["good"])[0].label == "positive"


def test_the_folder_that_prediction_looks_for_is_the_one_that_export_writes():
    from trainer.model import export

    assert export.INFO_FILE == run_folder.INFO_FILE


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "is not a run directory"),
        (("config.yaml",), "has no exported model"),
        (("config.json",), r"holds a model without samestep\.json"),
        (("adapter_config.json",), r"adapter_config\.json: task_type \(None\) is none that samestep knows"),
    ],
)
def test_a_folder_without_a_model_says_what_it_is(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        run_folder.find_exported(tmp_path)


def test_a_missing_run_names_those_that_are_there(run):
    with pytest.raises(CheckpointError, match=rf"does not exist; runs with a model are {run}"):
        run_folder.find_exported(run.with_name("tini"))


def test_a_damaged_samestep_json_is_named(run, tmp_path):
    copy = shutil.copytree(run / "model", tmp_path / "copy")
    (copy / "samestep.json").write_text('{"base": "x"}')
    with pytest.raises(CheckpointError, match=r"samestep\.json lacks label_names, max_length"):
        load_predictor(copy)
    (copy / "samestep.json").write_text('{"base": ')
    with pytest.raises(CheckpointError, match=r"samestep\.json cannot be read"):
        load_predictor(copy)


# The command


def test_lines_have_label_confidence_and_text(run, capfd):
    assert predict_command(run, ["good\nfilm", "bad"]) == 0
    shown = capfd.readouterr()
    first, second = (line.split("  ") for line in shown.out.splitlines())
    assert (first[0], first[2]) == ("positive", "good film")
    assert (second[0], second[2]) == ("negative", "bad")
    assert 0.5 < float(first[1]) <= 1.0
    assert shown.err.startswith("2 texts in ")


def test_file_gives_one_json_object_a_line_and_empty_lines_are_reported(run, tmp_path, capfd):
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffgood film\r\n\r\nbad\x0b film\n \n".encode() + b"very " * 40)
    assert predict_command(run, ["dull"], file=file, as_json=True) == 0
    shown = capfd.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["text"] for row in rows][:3] == ["dull", "good film", "bad\x0b film"]
    assert rows[1]["label"] == "positive"
    assert set(rows[1]["probabilities"]) == set(LABELS)
    assert [row["is_cut"] for row in rows] == [False, False, False, True]
    assert f"2 empty lines of --file ({file}) were left out: 2, 4" in shown.err
    assert "1 longer than the model's 12 tokens" in shown.err


def test_more_texts_than_are_read_at_once_stay_in_order(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("launch.predict.TEXTS_AT_ONCE", 3)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 2))
    predict_command(run, [], file=tmp_path / "texts.txt")
    assert [line.split("  ", 2)[2] for line in capfd.readouterr().out.splitlines()] == TEXTS * 2


def test_a_run_on_pairs_answers_pairs_and_refuses_a_text_alone(base, tmp_path, capfd):
    run = export_run(tmp_path / "pairs", base, "lora", pairs=True)
    file = tmp_path / "pairs.jsonl"
    pair = {"text": "good", "text_pair": "awful film"}
    file.write_text(f"\n{json.dumps(pair)}\n")
    capfd.readouterr()
    assert predict_command(run, [json.dumps(pair)], file=file, as_json=True) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    alone = load_predictor(run).predict([("good", "awful film")])[0]
    for row in rows:
        assert {key: row[key] for key in pair} == pair
        assert row["probabilities"] == pytest.approx(alone.probabilities, abs=1e-6)
    assert alone.probabilities != load_predictor(run).predict([("good awful film", "film")])[0].probabilities
    file.write_text(f"{json.dumps(pair)}\n\ngood\n")
    with pytest.raises(
        DataError, match=r'line 3 .*must be a pair of texts like those of the training; write it as {"text"'
    ):
        predict_command(run, [], file=file)


def test_half_a_surrogate_pair_is_refused(predictor):
    with pytest.raises(DataError, match=r"text 2 holds half of a surrogate pair.*write it in UTF-8"):
        predictor.predict(["good", "caf\udce9"])


def test_mistakes_name_the_fix(run, tmp_path):
    with pytest.raises(DataError, match="is not a file; give a text file"):
        predict_command(run, [], file=tmp_path / "missing.txt")
    with pytest.raises(DataError, match="an empty text"):
        predict_command(run, ["good", " "])
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="has no text"):
        predict_command(run, [], file=tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"good\nsch\xf6n\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        predict_command(run, [], file=tmp_path / "latin.txt")


def test_without_text_on_a_terminal_the_command_does_not_wait_for_typing(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(ConfigError, match="no text to predict"):
        predict_command(run, [])


def test_a_pipe_is_read_and_only_results_are_on_the_screen(run):
    code = (
        "import sys; from pathlib import Path; from launch.predict import predict_command\n"
        "sys.exit(predict_command(Path(sys.argv[1]), []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, input="good\nbad\n", capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["positive", "negative"]
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("2 texts in ")


def test_a_wrong_run_is_refused_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from launch.predict import predict_command\n"
        "try: predict_command(Path(sys.argv[1]), ['x'])\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "CheckpointError False\n"
