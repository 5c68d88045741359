"""Writing and publishing in the background: training waits for the copy alone.

One save is in flight at a time. Its thread writes, syncs and hashes this rank's files, then all ranks agree over a process group
of their own; only if every rank succeeded does rank 0 write the manifest and rename the folder. A failure leaves the older
checkpoints as they were and is known to every rank: the loop's next all-reduce makes all of them act on it together.
"""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.backend import Heartbeat, SideGroup
from trainer.checkpoint import store
from trainer.checkpoint.manifest import FileEntry, Manifest, manifest_text, sync_folder, write_synced
from trainer.checkpoint.shards import ShardImage, shard_name
from trainer.errors import CheckpointError
from trainer.faults import fault_point


@dataclass(frozen=True)
class Save:
    """One checkpoint about to be written."""

    header: Manifest
    """Without tensors and files."""
    shapes: dict[str, list[int]]
    """Whole shape of every tensor that this rank holds a part of."""
    shards: dict[str, ShardImage]
    """This rank's tensors by kind of file: weights, optimizer, rank."""
    files: dict[str, bytes]
    """Small files of rank 0."""
    best_step: int | None
    """Whose checkpoint is kept."""


PAUSE = 5.0
"""Times what a chunk took."""


@dataclass(frozen=True)
class Report:
    """What one rank tells the others about its files."""

    files: dict[str, FileEntry]
    shapes: dict[str, list[int]]
    error: str | None


class Saver:
    """Background writer of one rank. Every rank makes one and calls the same methods in the same order."""

    def __init__(
        self,
        root: Path,
        side: SideGroup,
        *,
        nonce: str,
        keep_last: int,
        say: Callable[[str], None],
        heartbeat: Heartbeat,
    ) -> None:
        """root: folder of checkpoints; say: shows a line, rank 0 only; heartbeat: hears of what the thread does."""
        self.root, self.side, self.nonce, self.keep_last = root, side, nonce, keep_last
        self.say, self.heartbeat = say, heartbeat
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[str | None] | None = None
        self.complaints: list[str] = []
        self.hurry = threading.Event()
        """Set while somebody waits for the save."""
        self.chunk_began = 0.0
        self.paused_s = 0.0
        """Of the save in flight."""
        self.longest_s = 0.0
        """Of all saves so far, without pauses."""

    def start(self, save: Save) -> None:
        """Write in the background. The one before must have ended (`wait`)."""
        assert self.pending is None
        self.hurry.clear()
        self.pending = self.pool.submit(self._run, save)

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the save in flight failed. Does not wait."""
        return self.pending is not None and self.pending.done() and self.pending.result() is not None

    def wait(self) -> None:
        """Until the save in flight is published. Raises CheckpointError, on all ranks, if it failed."""
        if self.pending is None:
            return
        self.hurry.set()
        error, self.pending = self.pending.result(), None
        for complaint in self.complaints:
            self.say(complaint)
        self.complaints.clear()
        if error is not None:
            raise CheckpointError(error)

    def close(self) -> None:
        """End the thread once it is done. A failure that nobody waited for is said, not raised: another error is on its way."""
        self.hurry.set()
        self.pool.shutdown(wait=True)
        if self.pending is not None and (error := self.pending.result()) is not None:
            self.say(error)

    # In the thread

    def _run(self, save: Save) -> str | None:
        """None, or why the checkpoint was not published; the same on every rank."""
        began, self.paused_s = time.perf_counter(), 0.0
        try:
            return self._write_and_publish(save)
        finally:
            self.longest_s = max(self.longest_s, time.perf_counter() - began - self.paused_s)

    def _write_and_publish(self, save: Save) -> str | None:
        with self.heartbeat.writing():
            report = self._write_own_files(save)
        reports = self.side.all_gather(report)
        error = "; ".join(
            f"rank {rank} could not write it: {report.error}" for rank, report in enumerate(reports) if report.error
        )
        if self.side.rank == 0:
            try:
                error = self._finish(save, reports, error)
            except Exception as failure:  # the other ranks wait for the outcome, whatever it is
                error = f"{type(failure).__name__}: {failure}"
        error = self.side.broadcast(error)
        if not error:
            return None
        return f"the checkpoint of step {save.header.step} was not saved: {error}; the earlier ones are as they were"

    def _write_own_files(self, save: Save) -> Report:
        files: dict[str, FileEntry] = {}
        side, step = self.side, save.header.step
        try:
            folder = store.start_folder(self.root, step, self.nonce)
            self.chunk_began = time.perf_counter()
            for kind, image in save.shards.items():
                name = shard_name(kind, side.rank, side.world_size)
                files[name] = image.write(folder / name, self._after_chunk)
                fault_point(f"save.{kind}", side.rank)
            for name, content in save.files.items():
                files[name] = write_synced(folder / name, content)
            fault_point("save.state", side.rank)
            sync_folder(folder)
        except Exception as error:  # whatever it is, the other ranks wait for this report
            return Report({}, {}, f"{type(error).__name__}: {error}")
        return Report(files, save.shapes, None)

    def _after_chunk(self) -> None:
        """Pause between chunks while training goes on, so that no single step pays for the whole save."""
        self.heartbeat.beat_in_background()
        written = time.perf_counter()
        self.hurry.wait(PAUSE * (written - self.chunk_began))
        self.chunk_began = time.perf_counter()
        self.paused_s += self.chunk_began - written

    def _finish(self, save: Save, reports: list[Report], error: str) -> str:
        """Rank 0: publish and prune, or take the unfinished folder away. What went wrong, or nothing."""
        folder = store.start_folder(self.root, save.header.step, self.nonce)
        if error:
            shutil.rmtree(folder, ignore_errors=True)
            return error
        tensors = {key: shape for report in reports for key, shape in report.shapes.items()}
        files = {name: entry for report in reports for name, entry in report.files.items()}
        manifest = save.header.model_copy(update={"tensors": tensors, "files": files})
        try:
            store.check_all_here(folder, files)
            store.publish(folder, self.root, manifest_text(manifest), save.header.step)
        except (OSError, CheckpointError) as failure:
            shutil.rmtree(folder, ignore_errors=True)
            return str(failure)
        try:
            store.point_latest(self.root, save.header.step)
            self.complaints += store.prune(
                self.root, keep_last=self.keep_last, best_step=save.best_step, nonce=self.nonce
            )
        except OSError as failure:  # the checkpoint is published: nothing here is a reason to stop
            self.complaints.append(f"after the checkpoint of step {save.header.step}: {failure}")
        fault_point("save.pruned", 0)
        return ""
