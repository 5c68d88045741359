"""`samestep data show --objective --plot`: marked text and pictures of real samples."""

from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from launch.data_objective import STYLES
from tests.tiny import tiny_llama, tiny_tokens
from trainer.data.batches import IGNORED
from trainer.data.objectives.marks import KINDS, marks_of
from trainer.data.objectives.pictures import COLORS
from trainer.data.objectives.rows import Vocabulary

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shown")
    tiny_llama(folder / "model")
    tiny_tokens(folder / "tokens", 60)
    data = [f"data.sources={folder / 'tokens'}", f"data.validation={folder / 'tokens'}", "data.sequence_length=48"]
    return [
        *data,
        f"model.source={folder / 'model'}",
        "data.max_epochs=50",
        "train.max_steps=2",
        f"data.cache={folder}",
    ]


def show(settings: list[str], *words: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["data", "show", str(ROOT / "recipes" / "pretrain_clm.py"), "3", *settings, *words])
    assert done.value.code == 0


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("clm", "each token is to be found from those before it"),
        ("mlm", "[<mask>="),
        ("mlm_nsp", "of the two texts: "),
        ("mlm_sop", "of the two texts: "),
        ("span_corruption", "--- to be found"),
        ("infilling", "<mask>"),
        ("plm", "[0:"),
    ],
)
def test_what_is_to_be_found_is_marked(
    objective: str, words: str, settings: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "sample.png"
    show(settings, "--objective", objective, "--plot", str(picture))
    said = capsys.readouterr().out
    assert words in said
    assert f"wrote {picture}" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_of_packed_documents_each_token_but_a_documents_first_is_to_be_found() -> None:
    special = np.arange(9) == 1  # the end of a document
    words = Vocabulary(9, 0, -1, -1, -1, np.zeros(0, np.int64), special, special, special)
    batch = {
        "input_ids": np.array([[5, 6, 1, 7, 8, 1, 0, 0]]),
        "labels": np.array([[6, 1, IGNORED, 8, 1, IGNORED, IGNORED, IGNORED]]),
        "attention_mask": np.arange(8)[None] < 6,
    }
    (marks,) = marks_of("clm", batch, 0, words, str).values()
    assert [mark.kind for mark in marks] == ["plain", "target", "target", "plain", "target", "target"]


@pytest.mark.parametrize(
    ("objective", "setting"), [("mlm", "data.noise_fraction=0.3"), ("span_corruption", "data.mean_span=5")]
)
def test_settings_of_the_objective_that_is_looked_at_are_taken(
    objective: str, setting: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    show([*settings, setting], "--objective", objective)
    assert "sample 3 of" in capsys.readouterr().out


def test_one_figure_explains_four(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(settings, "--objective", "four", "--plot", str(tmp_path / "four.png"))
    assert (tmp_path / "four.png").stat().st_size > 20_000
    assert "four.png" in capsys.readouterr().out


def test_an_unknown_objective_is_refused(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["data", "show", str(ROOT / "recipes" / "pretrain_clm.py"), "3", *settings, "--objective", "bert"])
    assert done.value.code == 2
    assert "--objective (bert): must be one of clm, mlm" in capsys.readouterr().err


def test_every_kind_has_a_colour_and_a_meaning() -> None:
    assert set(KINDS) == set(COLORS) == set(STYLES)
    assert len(np.unique(list(COLORS.values()))) == len(COLORS)
