"""Remote sources and plans in processes of their own: the command line, a read-only cache, and kills at any moment."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from tests.data.stream.test_remote import SETTINGS
from tests.data.stream.test_remote_faults import open_slow
from tests.tiny import tiny_tokens
from trainer.data.stream import remote
from trainer.data.stream.reader import Stream
from trainer.data.stream.remote import RemoteDataset
from trainer.data.stream.shards import DatasetWriter, Tokenizer, read_manifest


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset on disk, for file:// and slow://."""
    return tiny_tokens(tmp_path / "tokens", documents=100)


def show(source: str, cache: Path) -> list[str]:
    """The command that shows a sample of a remote source."""
    settings = [f"data.sources={source}", f"data.validation={source}", f"data.cache={cache}", "data.sequence_length=48"]
    few = ["train.global_batch_size=4", "train.max_steps=3"]
    return ["data", "show", "recipes/pretrain_clm.py", "6", *settings, *few]


def start(code: str, *, without_override: bool = False) -> subprocess.Popen[str]:
    """Python, as root without root's right to write where the mode forbids it (CAP_DAC_OVERRIDE), if asked for."""
    words = [sys.executable, "-c", code]
    if without_override:
        words[2] = (
            f"import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.executable, {words!r})"
        )
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_show_works_on_a_remote_source_whose_plans_are_kept(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, printed = show(f"file://{dataset}", tmp_path / "cache"), []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        printed.append(capsys.readouterr().out)
        for path in (tmp_path / "cache").rglob("*.ends"):
            path.unlink()  # as on a node that has the plans only
    assert printed[0] == printed[1]
    assert "document" in printed[0]


def test_a_command_whose_remote_hangs_ends(dataset: Path, tmp_path: Path) -> None:
    words = show(f"slow:/{dataset}", tmp_path / "cache")
    process = start(
        "import tests.data.stream.test_remote_faults as faults; from trainer.data.stream import remote\n"
        "remote.STALL_S, remote.FIRST_WAIT_S = 0.2, 0.001\n"
        "faults.SlowFileSystem.hangs.update({f'shard-{n:05d}.bin': 10**6 for n in range(100)})\n"
        f"from launch.cli import main; main({words!r})"
    )
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    assert "could not be read in 5 tries: nothing came for 0.2 s" in printed
    assert "Traceback" not in printed


def fill(cache: Path, source: str, *, shards: bool) -> None:
    """All of a source but its tokens, or with them."""
    found = RemoteDataset(source, cache, limit_bytes=1e9)
    for number, shard in enumerate(found.manifest.shards):
        found.ends(shard)
        if shards:
            found.fetch(number, [number])


def test_a_cache_that_is_read_only_is_an_error_unless_it_holds_all(dataset: Path, tmp_path: Path) -> None:
    source, caches = f"file://{dataset}", [tmp_path / name for name in ("empty", "some", "whole")]
    caches[0].mkdir()
    fill(caches[1], source, shards=False)
    fill(caches[2], source, shards=True)
    folders = [path for cache in caches for path in (cache, *cache.rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    process = start(
        "import contextlib, os, sys; from launch.cli import main\n"
        f"assert not any(os.access(folder, os.W_OK) for folder in {list(map(str, folders))!r}), 'they can be written'\n"
        f"for words in {[show(source, cache) for cache in caches]!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as ended: print('EXIT', ended.code or 0, file=sys.stderr)",
        without_override=True,
    )
    _, printed = process.communicate(timeout=60)
    for folder in folders:
        folder.chmod(0o755)
    empty, some, whole, rest = (part.strip() for part in re.split(r"EXIT \d+", printed))
    assert re.findall(r"EXIT (\d+)", printed) == ["2", "2", "0"], printed
    wanted = r"error: \S+{}, the cache of file://\S+, cannot be written: Permission denied; free space there or set data.cache"
    assert re.fullmatch(wanted.format(r"/empty/shards/\w+/manifest\.json"), empty), empty
    assert re.fullmatch(wanted.format(r"/some/shards/\w+/shard-\d+\.bin"), some), some
    assert (whole, rest) == ("", "")


def kill_when(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    """SIGKILL, as soon as it is time; the process must not end before."""
    try:
        deadline = time.monotonic() + 30
        while not is_time():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_while_downloading_nothing_wrong_is_left(tmp_path: Path) -> None:
    folder, cache = tmp_path / "tokens", tmp_path / "cache"
    writer = DatasetWriter(folder, Tokenizer(sha256="0" * 64, vocabulary=60_000, eos=None), shard_bytes=2_500_000)
    rng = np.random.default_rng(0)
    for _ in range(4):
        writer.add(rng.integers(0, 60_000, 1_300_000))
    writer.finish()
    process = start(
        "import tests.data.stream.test_remote_faults as faults; from pathlib import Path\n"
        "faults.SlowFileSystem.pause_s, faults.SlowFileSystem.PIECE = 0.05, 2**18\n"
        f"found = faults.open_slow(Path({str(folder)!r}))\n"
        "for number in range(4): found.fetch(number, range(4))"
    )
    kill_when(process, lambda: any(cache.rglob("shard-00000.bin")) and any_growing(cache))
    assert any_growing(cache)  # what was cut is still there
    kept = list(cache.rglob("*.bin"))
    assert 1 <= len(kept) < 4
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in kept)
    found = open_slow(folder)
    for number, shard in enumerate(found.manifest.shards):
        found.fetch(number, range(4))
        assert (found.folder / shard.file).read_bytes() == (folder / shard.file).read_bytes()
    assert not any_growing(cache)


def any_growing(cache: Path) -> bool:
    """Whether a download has begun and not ended."""
    return any(remote.size_on_disk(path) for path in cache.rglob("*.part"))


def test_killed_while_planning_nothing_wrong_is_left(tmp_path: Path) -> None:
    folder, plans = tiny_tokens(tmp_path / "tokens", documents=4000), tmp_path / "plans"
    process = start(
        "import tests.data.stream.test_remote_faults as faults; from pathlib import Path\n"
        f"faults.Stream([Path({str(folder)!r})], faults.SETTINGS, plan_folder=Path({str(plans)!r})).rows"
    )
    kill_when(process, lambda: len(list(plans.glob("*.plan"))) > 5)
    assert len(list(plans.glob("*.plan"))) < len(read_manifest(folder).shards)
    kept, fresh = Stream([folder], SETTINGS, plan_folder=plans), Stream([folder], SETTINGS)
    assert kept.rows == fresh.rows
    every = range(0, fresh.rows[0], 7)
    assert np.array_equal(kept.batch(every)["input_ids"], fresh.batch(every)["input_ids"])
