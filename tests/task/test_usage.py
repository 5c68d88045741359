"""The command that a finished run shows works for any name of its directory."""

import ast
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.predict import pair_of
from trainer.config import ClassificationData, RunConfig
from trainer.task.classification import ClassificationTask
from trainer.task.clm import ClmTask
from trainer.task.instruct import InstructTask
from trainer.task.objective import ObjectiveTask
from trainer.task.question_answering import QuestionAnsweringTask
from trainer.task.seq2seq import Seq2SeqTask
from trainer.task.token_classification import TokenClassificationTask

FOLDER = Path('my runs/Ann\'s "best" $1')
ALONE, PAIRS = ClassificationData(), ClassificationData(text_pair="hypothesis")
MASKED, PERMUTED = (
    SimpleNamespace(
        settings=SimpleNamespace(objective=objective),
        tokenizer=SimpleNamespace(mask_token="[MASK]"),
        vocabulary=SimpleNamespace(mask=0),
    )
    for objective in ("mlm", "plm")
)


@pytest.mark.parametrize(
    ("task", "state"),
    [
        *((ClassificationTask, SimpleNamespace(config=RunConfig(name="x", data=data))) for data in (ALONE, PAIRS)),
        *((task, None) for task in (TokenClassificationTask, QuestionAnsweringTask, Seq2SeqTask, InstructTask)),
        (ObjectiveTask, MASKED),
    ],
)
def test_a_shell_reads_the_folder_as_one_word(task: Any, state: Any) -> None:
    *command, text = shlex.split(task.usage(state, FOLDER))
    assert command[:3] == ["samestep", "predict", str(FOLDER)]
    is_for_pairs = task is ClassificationTask and state.config.data.text_pair is not None
    assert isinstance(pair_of(text), tuple) == is_for_pairs


@pytest.mark.parametrize(("task", "state"), [(ClmTask, None), (ObjectiveTask, PERMUTED)])
def test_a_shell_and_python_read_the_models_folder_as_one_text(task: Any, state: Any) -> None:
    python, option, code = shlex.split(task.usage(state, FOLDER))
    assert (python, option) == ("python", "-c")
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert str(FOLDER / "model") in texts
