"""`samestep data show RECIPE K --augment`, and what is refused about augmentation."""

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import Augmentation, ClassificationData
from trainer.config.augment import WORD_KINDS
from trainer.data.classify import read_splits

RECIPE = "recipes/lora_sst2.py"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("show")
    tiny_sentences(folder / "data.csv", rows=40)
    return [f"data.source={folder / 'data.csv'}", f"model.source={tiny_bert(folder / 'model')}"]


def show(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "show", *words])
    assert ended.value.code == code


def test_a_sentence_is_shown_before_and_after_each_kind(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    show(RECIPE, "3", "--augment", *settings)
    lines = capsys.readouterr().out.splitlines()
    source = settings[0].removeprefix("data.source=")
    text = read_splits(ClassificationData(source=source, labels=("negative", "positive"))).train.texts[3]
    assert lines[0].startswith("training sample 3 of lora_sst2: ")
    assert lines[1] == f"before            {text}"
    assert [line[:18].rstrip() for line in lines[2:]] == [f"{k}, epoch {e}" for k in WORD_KINDS for e in range(3)]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("target", ["multi", "regression"])
def test_labels_of_other_targets_are_shown(
    target: str, tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [["one", "two"], ["two"]] if target == "multi" else [0.5, 2]
    rows = [json.dumps({"text": f"film {number}", "label": labels[number % 2]}) for number in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    source = [f"data.source={tmp_path / 'x.jsonl'}", "data.labels=none", f"data.target={target}", settings[1]]
    show("recipes/full_sst2.py", "0", "--augment", "train.metric=loss", *source)
    first, before, *_ = capsys.readouterr().out.splitlines()
    odd = int(before.split()[-1]) % 2
    words = ("one, two", "two") if target == "multi" else ("0.5", "2")
    assert first == f"training sample 0 of full_sst2: {words[odd]}"


def test_a_blend_is_shown_with_both_sentences(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show(RECIPE, "3", "--augment", "data.augment.kinds=mixup", *settings)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 3
    for epoch, line in enumerate(lines):
        assert line.startswith(f"mixup, epoch {epoch}    0.") and " x '" in line and "' + 0." in line


@pytest.mark.parametrize(
    ("recipe", "sample", "message"),
    [
        (RECIPE, "28", "K (28) must be below 28, the number of training samples"),
        ("recipes/pretrain_clm.py", "0", "--augment: data.kind=stream has no augmentation"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    recipe: str, sample: str, message: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    show(recipe, sample, "--augment", *(settings if recipe == RECIPE else ()), code=2)
    assert message in capsys.readouterr().err
    show(recipe, sample, "--augment", "--objective", "mlm", code=2)
    assert "--augment shows sentences, without --objective and --plot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": ("paraphrase",)}, r"paraphraser \(none\) must name a model that writes texts, for paraphrase"),
        ({"kinds": ("back_translation",), "translator": "a"}, r"back_translator \(none\) must name a model"),
        ({"kinds": ("swap", "swap")}, "must differ from each other"),
        ({"mixup_alpha": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**wrong)  # type: ignore[arg-type]


def test_mixup_of_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text_pair \(b\) does not go with mixup"):
        ClassificationData(text_pair="b", augment=Augmentation(kinds=("mixup",)))


@pytest.mark.parametrize(
    "setting",
    ["probability=0.3", "fraction=0.2", "synonyms=x.tsv", "translator=x", "translator_prefix=x", "mixup_alpha=2"],
)
def test_settings_without_effect_are_refused(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(RECIPE, "0", "--augment", f"data.augment.{setting}", code=2)
    name, _, value = setting.partition("=")
    assert f"data.augment.{name} ({value}) on the command line: has no effect unless" in capsys.readouterr().err
