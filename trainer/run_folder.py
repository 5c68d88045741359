"""What makes a folder a run directory, and where its exported model lies. Imports no torch: commands answer at once.

Place in the flow: training writes such folders (trainer/log.py, trainer/output.py), prediction opens them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError

RUN_FILES = ("config.yaml", "metrics.jsonl")
"""Either of them makes a folder a run directory."""

JOBS = "slurm"
"""Subfolder that holds what Slurm jobs leave: script, starts, logs. It stays where it is when an earlier run is moved aside."""

JOB_FILE = "job.txt"
"""The Slurm job that began this run."""

MODEL_FOLDER = "model"
"""Subfolder of a run directory that holds the exported model or adapter."""

INFO_FILE = "samestep.json"
"""In an exported model's folder: what prediction needs to know."""


ADAPTER_FILE = "adapter_config.json"
"""PEFT's settings of an adapter; without samestep.json beside them the adapter was made by PEFT alone."""

PEFT_TASKS = {
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "clm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
"""model.task -> PEFT's name of it."""

PEFT_TYPES = {
    "LORA": "lora", "VERA": "vera", "IA3": "ia3", "PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix"
}  # fmt: skip
"""PEFT's name of a method -> ours."""

HEAD = r"\.(classifier|score|out_proj|logits_proj)\.weight$"
"""The layer that gives the classes; others before it, such as pre_classifier and classifier.dense, are saved with an adapter too."""

NEEDED = {"classification": ("base", "label_names", "max_length")}
"""What prediction needs to know, by task."""


def find_exported(path: Path, task: str | None = "classification") -> Path:
    """The folder of an exported model of a task, None for any: `path` itself or the model folder in it. CheckpointError says what lacks."""
    for folder in (path, path / MODEL_FOLDER):
        if any((folder / name).is_file() for name in (INFO_FILE, ADAPTER_FILE)):
            return _checked(folder, task)
    raise CheckpointError(_why_nothing_was_found(path))


def read_info(folder: Path) -> dict[str, Any]:
    """samestep.json of an exported folder; of an adapter that PEFT alone has made, what its settings and tensors say.

    CheckpointError where that is not enough, or a file is damaged; OSError where there is none.
    """
    if (folder / INFO_FILE).is_file() or not (folder / ADAPTER_FILE).is_file():
        return _read_object(folder / INFO_FILE)
    file = folder / ADAPTER_FILE
    settings = _read_object(file)
    tasks = {name: task for task, name in PEFT_TASKS.items()}
    task, base = tasks.get(str(settings.get("task_type"))), settings.get("base_model_name_or_path")
    method = PEFT_TYPES.get(str(settings.get("peft_type")))
    for name, value in (("task_type", task), ("base_model_name_or_path", base), ("peft_type", method)):
        if value is None:
            raise CheckpointError(f"{file}: {name} ({settings.get(name)}) is none that samestep knows; add it there")
    if method == "lora":
        method = "dora" if settings.get("use_dora") else "rslora" if settings.get("use_rslora") else "lora"
    found: dict[str, Any] = {"task": task, "method": method, "base": base}
    if task in ("classification", "token_classification"):
        found["label_names"] = _labels_of_head(folder)
        found["num_virtual_tokens"] = settings.get("num_virtual_tokens") or 0
    if task == "classification" and len(found["label_names"]) == 1:
        found["target"] = "regression"  # one class alone would always hold
    return found


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError for anything else, OSError where it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); take the model folder from its run again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; take the model folder from its run again")
    return content


def _labels_of_head(folder: Path) -> list[str]:
    """LABEL_0, LABEL_1, ...: as many as the head among an adapter's tensors has rows; from the header of its file alone."""
    file = folder / "adapter_model.safetensors"
    try:
        with file.open("rb") as tensors:
            size = int.from_bytes(tensors.read(8), "little")
            header = json.loads(tensors.read(size if size < file.stat().st_size else 0))
    except ValueError:
        raise CheckpointError(
            f"{file} is no safetensors file; fetch it again, with git-lfs where it came by git"
        ) from None
    heads = [entry["shape"] for name, entry in header.items() if re.search(HEAD, name) and len(entry["shape"]) == 2]
    if not heads:
        raise CheckpointError(f"{file} holds no classification head; save it with the adapter (PEFT's modules_to_save)")
    return [f"LABEL_{number}" for number in range(heads[0][0])]


def job_id(environ: Mapping[str, str]) -> str:
    """Of the Slurm job that this process runs in; empty outside of one.

    ARRAY_TASK for a task of an array: its SLURM_JOB_ID is the whole array's for one of the tasks, on which scontrol and scancel
    would act all at once.
    """
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def is_run(path: Path) -> bool:
    """Whether the folder holds a run, finished or not."""
    return any((path / name).is_file() for name in RUN_FILES)


def _checked(folder: Path, wanted: str | None) -> Path:
    """The folder, once its samestep.json says what prediction needs."""
    is_ours = (folder / INFO_FILE).is_file()
    file = folder / (INFO_FILE if is_ours else ADAPTER_FILE)
    try:
        info = read_info(folder)
        task = info.get("task", "classification")
        missing = [name for name in NEEDED.get(task, ("base",)) if is_ours and name not in info]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); take the model folder from its run again") from None
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; take the model folder from its run again")
    if wanted is not None and task != wanted:
        raise CheckpointError(
            f"{folder} holds a model of task {task}, and this is for {wanted}; samestep predict RUN asks it by its task"
        )
    return folder


def _why_nothing_was_found(path: Path) -> str:
    if not path.exists():
        return f"RUN ({path}) does not exist; {_runs_beside(path)}"
    if not path.is_dir():
        return f"RUN ({path}) is a file, and must be a run directory; {_runs_beside(path)}"
    if is_run(path):
        return (
            f"RUN ({path}) has no exported model, because the run has not finished its first evaluation; run it again"
        )
    if any((path / name).is_file() for name in ("bottleneck_config.json", "config.json")):
        return (
            f"RUN ({path}) holds a model without {INFO_FILE}, which samestep writes beside it; copy that file there too"
        )
    return (
        f"RUN ({path}) is not a run directory: it has neither {' nor '.join(RUN_FILES)}; {_runs_beside(path / 'any')}"
    )


def _runs_beside(path: Path) -> str:
    """A fix that names the runs which lie where `path` was looked for, or in runs/."""
    for parent in (path.parent, Path("runs")):
        ready = sorted(run for run in parent.glob("*") if (run / MODEL_FOLDER / INFO_FILE).is_file())
        if ready:
            return "runs with a model are " + ", ".join(map(str, ready[:8])) + (", ..." if len(ready) > 8 else "")
    return "give the run directory that training printed, such as runs/lora_sst2"
