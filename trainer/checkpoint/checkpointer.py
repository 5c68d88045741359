"""What the loop calls: save the state of this step, restore the newest good one. Every rank makes one and calls it alike.

Saved: trainable weights and their moments (each rank's share), buffers, the optimizer's step count, loss scale, position, counters, best
metric, the random number generators and open sums of every rank, the settings, and digests of base model and data.
"""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.backend import Engine, Piece, SideGroup
from trainer.checkpoint import store
from trainer.checkpoint.belongs import check_blocks, check_identity, check_names, check_ranks
from trainer.checkpoint.manifest import STATE, Manifest, checksum, read_manifest
from trainer.checkpoint.own import (
    SAME_ON_ALL,
    Own,
    bytes_tensor,
    check_generators,
    read_generators,
    read_own,
    read_window,
    seed_generators,
    topology_seed,
    window_tensors,
    write_generators,
)
from trainer.checkpoint.resume import Start
from trainer.checkpoint.saver import Save, Saver
from trainer.checkpoint.shards import ShardImage, ShardReader, image_of, is_tensor_file
from trainer.checkpoint.snapshot import BUFFER, Snapshots, buffer_pieces, owned_pieces
from trainer.checkpoint.state import TrainingState, read_state
from trainer.config import RunConfig
from trainer.errors import CheckpointError, DivergedError
from trainer.model.methods import METHODS
from trainer.progress import Progress
from trainer.versions import library_versions

SLOW_DISK = 50e6
"""Bytes per second of one rank."""


class DamagedError(Exception):
    """A checkpoint is not what was written; raised on all ranks."""


class Checkpointer:
    """Saves and restores one run. Collective but for `has_failed`."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        *,
        identity: Mapping[str, str | None],
        say: Callable[[str], None] = print,
    ) -> None:
        """identity: digests of `base` and `data` that a checkpoint must share; say: shows a line, on rank 0 only."""
        self.config, self.engine, self.identity, self.say = config, engine, dict(identity), say
        self.root = config.folder / store.CHECKPOINTS
        self.side = SideGroup(engine.rank, engine.world_size)
        self.saver = Saver(
            self.root,
            self.side,
            nonce=self.side.broadcast(secrets.token_hex(4)),
            keep_last=config.train.keep_last,
            say=lambda line: self.say(line),
            heartbeat=engine.heartbeat,
        )
        self.snapshots = Snapshots()
        self.saved_step = -1
        self.rank_state = b""  # the task's, of the checkpoint that was restored last

    # Saving

    def save(
        self, progress: Progress, small_files: Mapping[str, bytes], *, metric: float | None, rank_state: bytes = b""
    ) -> None:
        """Copy the state and return; writing goes on in the background. Waits for the save before, whose failure it raises.

        rank_state: what the task on this rank needs to read on, where that is no function of the step.
        """
        self.wait()
        engine, rank, world_size = self.engine, self.engine.rank, self.engine.world_size
        pieces = self.local_state()
        shapes = {piece.key: list(piece.shape) for piece in pieces}
        images = self.snapshot(pieces)
        own = image_of(window_tensors(progress.window) | read_generators(engine.device) | bytes_tensor(rank_state))
        state = self.describe(progress)
        files = {} if rank else {STATE: state.model_dump_json(indent=1).encode(), **small_files}
        header = Manifest(
            format="samestep-checkpoint-1",
            step=progress.step,
            backend=engine.backend,
            world_size=world_size,
            precision=engine.precision,
            metric=metric,
            config_hash=checksum(state.config),
            versions=library_versions(),
            tensors={},
            files={},
        )
        self.saver.start(Save(header, shapes, images | {"rank": own}, files, progress.best_step))
        self.saved_step = progress.step

    def local_state(self) -> list[Piece]:
        """The engine's, and unless a base model has them the buffers of the model's files, which every rank holds whole."""
        is_adapter = METHODS[self.config.method.name].is_adapter
        return self.engine.local_state() + ([] if is_adapter else list(buffer_pieces(self.engine.module)))

    def snapshot(self, pieces: list[Piece]) -> dict[str, ShardImage]:
        """Copies of this rank's part of the state, by kind of file."""
        if self.engine.is_replicated:
            pieces = list(owned_pieces(pieces, self.engine.rank, self.engine.world_size))
        elif self.engine.rank:
            pieces = [piece for piece in pieces if piece.kind != BUFFER]
        return self.snapshots.take([piece for piece in pieces if piece.values.numel()])

    def describe(self, progress: Progress) -> TrainingState:
        """state.json."""
        engine = self.engine
        return TrainingState(
            counters=progress.counters(),
            optimizer_steps=engine.optimizer_steps,
            own_steps=engine.own_steps,
            loss_scale=engine.loss_scale,
            good_steps=engine.good_steps,
            identity=self.identity,
            config=self.config.model_dump(mode="json"),
        )

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the save in flight failed; the loop sums it over ranks and then calls `wait` on all."""
        return self.saver.has_failed

    def seconds_of_a_save(self) -> float:
        """What the longest save of this process took without its pauses; before the first, a guess for a slow disk."""
        num_bytes = sum(image.size for image in self.snapshots.images.values())
        return self.saver.longest_s or num_bytes / SLOW_DISK

    def wait(self) -> None:
        """Until the last save is published; raises CheckpointError on all ranks if it failed."""
        with self.engine.heartbeat.long("waiting for a checkpoint to be written"):
            self.saver.wait()

    def close(self) -> None:
        """End the background thread."""
        self.saver.close()

    # Restoring

    def clean(self) -> None:
        """Make the folder of checkpoints, and delete what killed saves left. Rank 0 does it, before any save."""

        def act() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            store.remove_leftovers(self.root)

        self.side.on_rank_0(act)

    def prepare(self) -> None:
        """Take the memory for snapshots now: fresh memory is slow, and no step should wait for it."""
        self.snapshot(self.local_state())

    def restore(self, start: Start) -> Progress:
        """Load the newest good checkpoint of `start`, the newest first.

        A damaged one is passed over, and said so; one that `train.resume` names is refused. CheckpointError, on all ranks, where
        none is good.
        """
        for folder in start.checkpoints:
            try:
                with self.engine.heartbeat.long(f"restoring {folder}"):
                    progress = self.load(folder)
            except DamagedError as damage:
                if start.is_named:
                    raise CheckpointError(f"train.resume names a damaged checkpoint: {damage}") from None
                self.say(f"checkpoint passed over: {damage}")
                continue
            self.say(f"continuing from {folder}")
            self.set_aside_later_than(progress.step)
            return progress
        raise CheckpointError(
            f"none of the {len(start.checkpoints)} checkpoints in {self.root} is whole; train.resume=never starts anew"
        )

    def roll_back(self, bad: Progress) -> Progress:
        """The newest good checkpoint of this run, with the step of `bad` left out from there. Remembered across restarts."""
        self.wait()
        own = tuple(self.side.on_rank_0(lambda: store.list_checkpoints(self.root)))
        if not own:
            raise DivergedError(
                f"step {bad.step + 1} asks for a rollback, but there is no checkpoint yet; lower optim.peak_lr"
            )
        progress = self.restore(Start("continue", own))
        progress.num_rollbacks, progress.left_out_steps = bad.num_rollbacks + 1, [*bad.left_out_steps, bad.step]
        number, left_out = progress.num_rollbacks, progress.left_out_steps
        self.side.on_rank_0(lambda: store.write_rollbacks(self.root, number, left_out))
        return progress

    def remember_rollbacks(self, progress: Progress) -> None:
        """Rollbacks that came after the checkpoint was written, and after which the run was killed."""
        found = self.side.on_rank_0(lambda: store.read_rollbacks(self.root))
        if found is not None and found[0] > progress.num_rollbacks:
            progress.num_rollbacks, progress.left_out_steps = found

    def set_aside_later_than(self, step: int) -> None:
        """Rename checkpoints of later steps, which were damaged or are trained again; they are kept, and no longer listed. Collective."""

        def act() -> None:
            for folder in store.list_checkpoints(self.root):
                if store.step_of(folder) > step:
                    aside = store.set_aside(folder)
                    self.say(f"{folder.name} is set aside as {aside.name}")

        self.side.on_rank_0(act)

    def load(self, folder: Path) -> Progress:
        """Weights, moments, counters and random numbers of a checkpoint; each file is read once and verified on the way."""
        damage = store.describe_damage(folder, is_hashed=lambda name: not is_tensor_file(name))
        self.raise_together(damage, DamagedError)
        problem, is_same = None, False
        try:
            manifest = read_manifest(folder)
            state = read_state(folder, manifest)
            progress = Progress.restored(state.counters)
            check_identity(folder, state, self.identity, self.config)
            check_ranks(folder, manifest, self.engine.world_size)
            check_blocks(folder, manifest, self.engine.backend, self.engine.world_size)
            if state.counters.step != manifest.step:
                raise CheckpointError(f"{folder}: its state is of step {state.counters.step}, not {manifest.step}")
            own = read_own(folder, manifest.world_size)
            is_same = self.is_same_topology(manifest, own)
            if is_same:
                check_generators(folder, own[self.engine.rank].generators, self.engine.device)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        self.raise_together(problem, CheckpointError)
        self.load_tensors(folder, manifest)
        engine = self.engine
        engine.state_was_written(state.optimizer_steps, state.own_steps)
        engine.restore_loss_scale(state.loss_scale if manifest.precision == "fp16" else None, state.good_steps)
        if manifest.precision != engine.precision:
            self.say(
                f"precision changed since the checkpoint: {manifest.precision} -> {engine.precision}; weights are exact"
            )
        self.restore_own(manifest, own, progress, is_same=all(self.side.all_gather(is_same)))
        self.remember_rollbacks(progress)
        self.saved_step = progress.step if folder.resolve().parent == self.root.resolve() else -1
        return progress

    def raise_together(self, problem: str | None, kind: type[Exception]) -> None:
        """An error on all ranks if any rank has a problem."""
        problems = [found for found in self.side.all_gather(problem) if found]
        if problems:
            raise kind(problems[0])

    def load_tensors(self, folder: Path, manifest: Manifest) -> None:
        """Fill this rank's pieces, each from the ranges of whatever ranks wrote it. The ranks share out which files they hash."""
        pieces = self.local_state()
        shapes = self.side.all_gather({piece.key: list(piece.shape) for piece in pieces})
        wanted = {key: shape for part in shapes for key, shape in part.items()}
        check_names(folder, wanted, manifest.tensors)
        files = sorted(filter(is_tensor_file, manifest.files))
        own = files[self.engine.rank :: self.engine.world_size]
        problem = None
        try:
            reader = ShardReader(folder, files)
            for key, shape in wanted.items():
                reader.check_tiling(key, shape)
            hashes = {name: manifest.files[name].blake3 for name in own}
            reader.fill(pieces, hashes, shared=self.engine.is_replicated)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        self.raise_together(problem, DamagedError)

    def is_same_topology(self, manifest: Manifest, own: list[Own]) -> bool:
        """Whether this rank's random numbers can go on exactly: the same backend and ranks, and not from a GPU to a CPU."""
        engine = self.engine
        same = (manifest.backend, manifest.world_size) == (engine.backend, engine.world_size)
        return same and own[engine.rank].generators.keys() == read_generators(engine.device).keys()

    def restore_own(self, manifest: Manifest, own: list[Own], progress: Progress, *, is_same: bool) -> None:
        """Random numbers and open sums of this rank: exactly under the topology that saved them, else from (seed, step, rank)."""
        engine = self.engine
        self.rank_state = own[engine.rank].task if engine.rank < len(own) else b""
        windows = [of_rank.window for of_rank in own]
        if is_same:
            progress.window = read_window(windows[engine.rank])
            write_generators(own[engine.rank].generators, engine.device)
            return
        # The sums of all ranks, by one of them. The others hold zeros of the same quantities: all agree whether a window is open.
        sums = {key: 0.0 if engine.rank else sum(window[key] for window in windows) for key in windows[0]}
        progress.window = read_window(sums | {key: windows[0][key] for key in SAME_ON_ALL})
        seed_generators(topology_seed(self.config.train.seed, progress.step, engine.rank))
        self.say(
            f"saved by {manifest.backend} on {manifest.world_size}, continued by {engine.backend} on {engine.world_size}: weights, "
            "moments and sample order are exact, dropout draws anew from (seed, step, rank)"
        )
