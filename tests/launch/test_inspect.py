"""`samestep inspect`: what it says of a model is what transformers loads, and no weights are read."""

import json
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from launch.cli import main
from tests.tiny import tiny_bert


def inspect(*words: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["inspect", *words])
    assert done.value.code == 0


def test_sizes_and_parameters_are_those_of_the_loaded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_bert(tmp_path / "bert")
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    capsys.readouterr()  # what libraries said at their import
    inspect(str(folder), "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters without head"] == sum(p.numel() for p in model.parameters())
    assert facts["of each layer"] == sum(p.numel() for p in model.encoder.layer[0].parameters())
    assert facts["of token embeddings"] == model.embeddings.word_embeddings.weight.numel()
    assert (facts["layers"], facts["attention heads"], facts["hidden size"], facts["positions"]) == (2, 2, 32, 128)
    assert facts["architecture"] == "BertModel (bert)"
    assert "mask [MASK]" in facts["special tokens"]


def test_a_text_is_shown_as_the_tokenizer_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_bert(tmp_path / "bert")
    text = "the film is superb"
    inspect(str(folder), text, "dull [x]", "--json")
    first, second = json.loads(capsys.readouterr().out)["texts"]
    encoded = AutoTokenizer.from_pretrained(folder)(text)
    assert first["input_ids"] == encoded["input_ids"]
    assert first["attention_mask"] == encoded["attention_mask"]
    assert first["tokens"] == ["[CLS]", *text.split(), "[SEP]"]
    assert second["text"] == "dull [x]"
    inspect(str(folder), text)
    said = capsys.readouterr().out
    assert "4 words, 6 tokens" in said
    assert "superb" in said.splitlines()[-2]


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(tmp_path / "nothing")])
    assert done.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [('{"base": ', "cannot be read"), ("{}", "lacks"), ("[]", "not a JSON")])
def test_a_damaged_run_is_one_sentence(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "samestep.json").write_text(text)
    for words in (["inspect", str(tmp_path)], ["adapter", "inspect", str(tmp_path)], ["predict", str(tmp_path), "x"]):
        with pytest.raises(SystemExit) as done:
            main(words)
        assert done.value.code == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'model' / 'samestep.json'} " in said and message in said
        assert "\n" not in said.strip()


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    chart = tmp_path / "file" / "folder" / "methods.png"
    with pytest.raises(SystemExit) as done:
        main(["methods", str(tiny_bert(tmp_path / "bert")), "--chart", str(chart)])
    assert done.value.code == 2
    assert f"error: {tmp_path / 'file'}" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(tiny_bert(tmp_path / "bert")), "caf\udce9"])
    assert done.value.code == 2
    assert "TEXT holds half of a surrogate pair" in capsys.readouterr().err
