"""What a run leaves behind: lines on the screen, metrics, the exported model, plots and a summary, all in the run directory.

The loop calls it at its three `if`s. Only rank 0 writes; the methods that gather weights or test are collective and say so.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

from trainer.backend import Engine, NoRoomError
from trainer.checkpoint.resume import OUTCOME
from trainer.config import RunConfig
from trainer.errors import CheckpointError, SamestepError
from trainer.faults import fault_point
from trainer.log import RunLog, lock_run_folder, start_run_folder, write_summary
from trainer.model.export import adapter_files, export_model, load_exported
from trainer.model.methods import METHODS
from trainer.model.vocabulary import tokenizer_files
from trainer.plots import plot_curves
from trainer.resolve import config_to_yaml
from trainer.run_folder import INFO_FILE, JOB_FILE, job_id
from trainer.task import Evaluation, Task

if TYPE_CHECKING:
    from trainer.progress import Progress


class RunOutput:
    """The run directory of one run. Every rank makes one."""

    def __init__(
        self, config: RunConfig, engine: Engine, task: Task, num_steps: int, *, base: str | None, is_fresh: bool
    ) -> None:
        """Start the folder, config.yaml first; for a fresh run an earlier one of this name is moved aside. Collective.

        base: digest of the frozen weights, which an exported adapter belongs to.
        """
        self.config, self.engine, self.task, self.base = config, engine, task, base
        self.is_main, self.folder, self.is_fresh = engine.rank == 0, config.folder, is_fresh
        self.lock: FileLock | None = None
        self.on_rank_0(self.start_folder)
        self.log = RunLog(self.folder, is_main=self.is_main, total_steps=num_steps)
        self.log.say(self.describe_backend() + self.describe_nodes())
        self.started = time.perf_counter()
        self.speeds: list[float] = []
        """Of each log line, in `task.speed`."""

    def on_rank_0(self, write: Callable[[], None]) -> None:
        """Run `write` on rank 0 and wait for it; where it raises, every rank does. Collective."""
        failure: Exception | None = None
        with self.engine.heartbeat.long("writing on rank 0"):
            if self.is_main:
                try:
                    write()
                except OSError as error:
                    failure = SamestepError(f"{error.filename or self.folder} cannot be written: {error.strerror}")
                except Exception as error:  # whatever it is, the other ranks wait for the outcome
                    of_disk = type(error) in (SafetensorError, Exception)  # what safetensors and tokenizers raise
                    failure = SamestepError(f"{self.folder} cannot be written: {error}") if of_disk else error
            num_failures = self.engine.sum_over_ranks([float(failure is not None)])[0]
        if num_failures:
            raise failure or SamestepError("rank 0 could not write to the run directory; see its message")

    def start_folder(self) -> None:
        """Rank 0: an empty run directory, or the one to continue, with the resolved config."""
        self.lock = lock_run_folder(self.folder)
        if self.is_fresh:
            start_run_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / OUTCOME).unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(config_to_yaml(self.config), encoding="utf-8")
        if self.is_fresh and (job := job_id(os.environ)):
            (self.folder / JOB_FILE).write_text(job, encoding="utf-8")

    def describe_backend(self) -> str:
        """What is about to run, and on how much of the machine."""
        engine = self.engine
        words = f"backend    {engine.describe()}"
        if engine.device.type != "cpu":
            return words
        threads, cores = torch.get_num_threads(), os.cpu_count() or 1
        words += f", {threads} thread(s) each on {cores} cores"
        if engine.world_size * threads * 2 <= cores:  # accelerate launch sets one thread where the user sets none
            words += f"; OMP_NUM_THREADS={cores // engine.world_size} would use them all"
        return words

    def describe_nodes(self) -> str:
        """A line for each node with its ranks, each by that rank's own word; nothing on one node. Collective."""
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:  # set by torchrun and accelerate launch
            return ""
        engine = self.engine
        own = [0.0] * engine.world_size
        own[engine.rank] = float(os.environ["GROUP_RANK"])
        nodes = [int(node) for node in engine.sum_over_ranks(own)]
        ranks = {node: [rank for rank, its in enumerate(nodes) if its == node] for node in sorted(set(nodes))}
        lines = [
            f"\nnode {node}     ranks {', '.join(map(str, its))} of {engine.world_size}" for node, its in ranks.items()
        ]
        return "".join(lines)

    def continue_from(self, progress: "Progress", words: str) -> None:
        """Drop what was logged after the restored step, which comes again, and say what differs from the earlier start. Collective.

        Where the exported model is not the best one that `progress` knows of, or missing, the next evaluation is the best.
        """
        self.log.rewind(progress.step)
        if words:
            self.log.say(words)
        step = self.exported_step() if self.is_main else None
        differs = self.is_main and progress.best_metric is not None and step != progress.best_step
        if self.engine.sum_over_ranks([float(differs)])[0]:
            self.log.say(
                f"the exported model is not that of step {progress.best_step}: the best is looked for anew from here"
            )
            progress.best_metric = None

    def failed(self, progress: "Progress") -> None:
        """Note that training could not go on."""
        if self.is_main:
            self.write_outcome("failed", progress)

    def small_files(self, step: int) -> dict[str, bytes]:
        """What a checkpoint needs to become a Hugging Face model again: settings of model, adapter and task."""
        if not self.is_main:
            return {}
        files = {
            "config.json": cast(Any, self.engine.module).config.to_json_string(use_diff=False),
            INFO_FILE: json.dumps(self.describe_model(step), indent=1),
        }
        files |= adapter_files(self.engine.module)
        own = tokenizer_files(self.task.tokenizer) if self.config.model.added_tokens is not None else {}
        return {name: text.encode() for name, text in files.items()} | own | self.task.tokenizer_files()

    def write_outcome(self, outcome: str, progress: "Progress") -> None:
        """Rank 0: how this start ended, for whoever starts the run again."""
        fresh = self.folder / f".{OUTCOME}"
        fresh.write_text(json.dumps({"outcome": outcome, "step": progress.step}) + "\n", encoding="utf-8")
        fresh.replace(self.folder / OUTCOME)

    def stopped(self, progress: "Progress") -> None:
        """Say that the run was stopped and how it goes on."""
        if self.is_main:
            self.write_outcome("stopped", progress)
        self.log.say(
            f"stopped on request after step {progress.step}, which is saved; the same command goes on from there\n"
            f"run directory: {self.folder}"
        )

    def close(self) -> None:
        """Flush the logs and let others use the run directory."""
        self.log.close()
        if self.lock is not None:
            self.lock.release()

    @property
    def model_folder(self) -> Path:
        """Where the exported model or adapter lies."""
        return self.folder / "model"

    def train_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of training metrics."""
        self.speeds.append(values[self.task.speed])
        self.log.record(values, step)
        self.log.progress(step, values)

    def eval_metrics(self, step: int, metrics: Mapping[str, float], *, is_best: bool) -> None:
        """One line of validation metrics."""
        self.log.record({f"eval/{name}": value for name, value in metrics.items()}, step)
        words = "  ".join(f"{name} {metrics[name]:.4f}" for name in self.task.shown_metrics)
        self.log.say(f"step {step}: validation {words}" + ("  (best so far, exported)" if is_best else ""))

    def export(self, step: int) -> None:
        """Write the present weights as a model or adapter that opens without samestep; replaces the earlier one whole. Collective."""
        adapter = METHODS[self.config.method.name].is_adapter
        state: dict[str, Tensor] = {}
        for name, tensor in self.engine.weights(trainable_only=adapter):
            if self.is_main:
                state[name] = tensor.detach().cpu() if tensor.device.type != "cpu" else tensor.detach().clone()
        self.on_rank_0(lambda: self.replace_model(state, step))

    def replace_model(self, state: Mapping[str, Tensor], step: int) -> None:
        """Rank 0: write the model beside the old one, then change places."""
        fresh, old = self.folder / ".model-new", self.folder / ".model-old"
        shutil.rmtree(fresh, ignore_errors=True)
        export_model(self.engine.module, state, self.task.tokenizer, fresh, self.describe_model(step))
        if self.model_folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # left by a kill in its removal
            self.model_folder.rename(old)
        fault_point("export", 0)
        fresh.rename(self.model_folder)
        shutil.rmtree(old, ignore_errors=True)

    def exported_step(self) -> int | None:
        """The step whose weights lie in the model folder; None without any. Rank 0."""
        try:
            return int(json.loads((self.model_folder / INFO_FILE).read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def describe_model(self, step: int) -> dict[str, object]:
        """model/samestep.json: what prediction needs to know."""
        method = self.config.method
        quantization = method.model_dump(include={"quantize", "double_quantization"})
        return {
            "task": self.config.model.task,
            "method": method.name,
            "base": self.config.model.source,
            **({"quantization": quantization} if quantization else {}),
            **({"base_identity": self.base} if METHODS[method.name].is_adapter else {}),
            **self.task.model_info(),
            "step": step,
        }

    def report(self, progress: "Progress") -> None:
        """Test the exported model, write plots, summary and outcome, and say where everything is. Collective."""
        task, split_name = self.task, self.task.report_split
        try:
            with self.engine.alone():
                with self.engine.heartbeat.long("opening the exported model"):  # whole, beside what training holds
                    model = load_exported(self.model_folder)[0].to(self.engine.device).eval()
                evaluation = task.evaluate(lambda inputs: model(**inputs), self.engine, split_name)
                with self.engine.heartbeat.long("generating"):
                    metrics = evaluation.metrics | task.generation_metrics(model, self.engine)
        except NoRoomError:
            raise self.untested(progress) from None
        elapsed_s = time.perf_counter() - self.started
        if self.is_main:
            prefix = "test" if split_name == "test" else "eval"
            self.log.record(
                {f"{prefix}/{name}": value for name, value in metrics.items()} | {"best_step": progress.best_step},
                progress.step,
            )
        self.on_rank_0(lambda: self.draw(model, evaluation))
        if self.is_main:
            write_summary(self.folder / "summary.md", self.facts(progress, split_name, metrics, elapsed_s))
            self.write_outcome("finished", progress)
            self.log.say(self.closing_words(progress, split_name, metrics, elapsed_s))

    def untested(self, progress: "Progress") -> CheckpointError:
        """What to raise on all ranks. The run counts as finished, so that another start does not fail at the same place."""
        if self.is_main:
            self.write_outcome("finished", progress)
        return CheckpointError(
            f"{self.model_folder}: training is finished and the model is whole, but it was not tested: in fp32 its test does not fit on "
            f"{self.engine.device.type} beside training; look at it with samestep predict {quote(str(self.folder))}, or on a larger device"
        )

    def draw(self, model: nn.Module, evaluation: Evaluation) -> None:
        """Rank 0: curves.png, and what the task adds where the device has room for it."""
        plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        try:
            self.task.write_report(self.folder, model, evaluation)
        except torch.OutOfMemoryError:
            self.log.say(f"samples were not written: {self.engine.device} has no room for them beside training")

    def facts(
        self, progress: "Progress", split_name: str, metrics: Mapping[str, float], elapsed_s: float
    ) -> dict[str, object]:
        """What summary.md says."""
        engine, unit = self.engine, self.task.speed.removesuffix("_per_s")
        return {
            "name": self.config.name,
            "backend": engine.describe(),
            "steps": progress.step,
            "best step": f"{progress.best_step} (validation {self.config.watched_metric} {progress.best_metric:.4f})",
            **{f"{split_name} {name}": value for name, value in metrics.items()},
            "time": f"{elapsed_s:.0f} s",
            "training speed": f"{float(np.median(self.speeds)) if self.speeds else 0.0:,.1f} {unit}/s (median)",
            "skipped steps": progress.num_skipped,
            "a resume is": self.engine.exactness(deterministic=self.config.train.deterministic),
            "model": str(self.model_folder),
            "use it": self.task.usage(self.folder),
        }

    def closing_words(
        self, progress: "Progress", split_name: str, metrics: Mapping[str, float], elapsed_s: float
    ) -> str:
        """The last lines of a run."""
        kind = "adapter" if METHODS[self.config.method.name].is_adapter else "model"
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "count")
        return (
            f"{split_name} ({int(metrics['count']):,} {self.task.counted}, exported {kind} of step {progress.best_step}): {numbers}\n"
            f"trained {progress.step} steps in {elapsed_s:.0f} s\n"
            f"run directory: {self.folder}"
        )
