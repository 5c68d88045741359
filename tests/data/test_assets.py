"""Assets: the real ones are what the design says, and a fetch that goes wrong says so and leaves nothing half-made.

Faults are tested on a tiny wheel that pip takes from a local folder or server, so that no test needs a network.
"""

import csv
import functools
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from trainer.data.assets import asset_path, put_asset
from trainer.data.fetch import MANIFEST, Asset, fetch, put
from trainer.data.made import made_once
from trainer.errors import DataError

WHEEL = "samestep_tiny_asset-1.0-py3-none-any.whl"


def unpack_tiny(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        (folder / "data.bin").write_bytes(wheel.read("samestep_tiny_asset/data.bin"))
        (folder / "deep").mkdir()
        (folder / "deep" / "note.txt").write_bytes(wheel.read("samestep_tiny_asset/note.txt"))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A wheel of 256 KB in the only folder that pip may look into."""
    links = tmp_path / "links"
    links.mkdir()
    info = "samestep_tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(links / WHEEL, "w") as wheel:
        wheel.writestr("samestep_tiny_asset/data.bin", bytes(range(256)) * 1024)
        wheel.writestr("samestep_tiny_asset/note.txt", "kept")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: samestep-tiny-asset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    _only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(links))
    digest = hashlib.sha256((links / WHEEL).read_bytes()).hexdigest()
    return Asset("tiny", "samestep-tiny-asset==1.0", "wheel", digest, 1, unpack_tiny)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _only_index(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    """pip sees these settings and nothing of this machine's own."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0", **settings}.items():
        monkeypatch.setenv(name, value)


def _small_folder(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "data.bin").write_bytes(b"stands in")
    return tmp_path / "small"


def _visible(cache: Path) -> list[str]:
    """What is in the cache, temporary folders too; only lock files do not count."""
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_sst_holds_the_sentences_of_the_binary_task() -> None:
    with (asset_path("sst") / "sst.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    assert Counter(row["label"] for row in rows) == {"negative": 5076, "positive": 4996}
    assert all(set(row) == {"text", "label"} and row["text"].strip() == row["text"] != "" for row in rows)
    assert rows[0]["text"].startswith("The Rock is destined to be the 21st Century's new ''Conan''")
    assert any('into a 9" black and white' in row["text"] for row in rows)
    assert any("the clichés disappear" in row["text"] for row in rows)


def test_minilm_is_a_pretrained_encoder_that_knows_similar_sentences() -> None:
    folder = asset_path("minilm")
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["A great movie.", "A wonderful film.", "The bus is late."], padding="longest", return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]


def test_an_unknown_asset_is_refused_with_a_suggestion() -> None:
    with pytest.raises(DataError, match=r"asset:minilmm does not exist; did you mean asset:minilm\?.*minilm, sst"):
        asset_path("minilmm")


def test_an_asset_may_be_fetched_while_something_of_a_longer_name_is_made_of_it(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(cache))

    def make(file: Path) -> None:
        file.write_text((fetch(tiny, cache) / "deep" / "note.txt").read_text())

    assert made_once("tiny-tokens", make).read_text() == "kept"
    assert _visible(cache) == ["tiny"]


def test_a_fetched_asset_is_whole_and_used_again_without_pip(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(tiny, cache)
    assert folder == cache / "tiny"
    assert (folder / "data.bin").stat().st_size == 256 * 1024
    assert (folder / "deep" / "note.txt").read_text() == "kept"
    assert _visible(cache) == ["tiny"]
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert fetch(tiny, cache) == folder


@pytest.mark.parametrize("damage", ["data.bin", MANIFEST])
def test_a_damaged_asset_is_made_again(tiny: Asset, cache: Path, tmp_path: Path, damage: str) -> None:
    folder = put(tiny, _small_folder(tmp_path), cache)
    assert (fetch(tiny, cache) / "data.bin").stat().st_size == 9
    os.truncate(folder / damage, 3)
    assert (fetch(tiny, cache) / "data.bin").stat().st_size == 256 * 1024
    assert (folder / "deep" / "note.txt").read_text() == "kept"
    assert _visible(cache) == ["tiny"]


def test_an_asset_of_another_package_version_is_made_again(tiny: Asset, cache: Path, tmp_path: Path) -> None:
    put(replace(tiny, package="samestep-tiny-asset==0.9"), _small_folder(tmp_path), cache)
    assert (fetch(tiny, cache) / "data.bin").stat().st_size == 256 * 1024


def test_a_wrong_hash_names_the_file_and_both_hashes(tiny: Asset, cache: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(DataError) as caught:
        fetch(replace(tiny, sha256=wrong), cache)
    message = str(caught.value)
    assert WHEEL in message and tiny.sha256 in message and wrong in message and "Run again" in message
    assert _visible(cache) == []


def test_a_truncated_archive_is_refused(tiny: Asset, cache: Path) -> None:
    archive = Path(os.environ["PIP_FIND_LINKS"]) / WHEEL
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(DataError, match="cut short"):
        fetch(tiny, cache)
    assert _visible(cache) == []


class _CutOff(http.server.SimpleHTTPRequestHandler):
    """Announces the whole file and hangs up after 1,000 bytes."""

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:1000])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the screen."""


@pytest.fixture
def cut_off_server(tiny: Asset) -> Iterator[str]:
    handler = functools.partial(_CutOff, directory=os.environ["PIP_FIND_LINKS"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_a_download_that_breaks_off_is_one_clear_error(
    tiny: Asset, cache: Path, cut_off_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=cut_off_server, PIP_RESUME_RETRIES="0")
    with pytest.raises(
        DataError, match=r"cannot download samestep-tiny-asset==1\.0 \(.*\)\. Check the network"
    ) as caught:
        fetch(tiny, cache)
    assert "\n" not in str(caught.value)
    assert _visible(cache) == []


def test_no_network_names_what_to_check_and_the_way_without(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only_index(monkeypatch, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    with pytest.raises(DataError, match=r"proxy \(HTTPS_PROXY\).*package index.*SAMESTEP_CACHE") as caught:
        fetch(tiny, cache)
    assert str(cache) in str(caught.value) and "\n" not in str(caught.value)
    assert _visible(cache) == []


@pytest.mark.parametrize(("file_limit", "stage"), [(100_000, "download"), (300_000, "unpack")])
def test_a_full_disk_names_the_folder_and_the_space_needed(
    tiny: Asset, cache: Path, file_limit: int, stage: str
) -> None:
    """A limit on file sizes stands for the disk: 100 KB is less than the wheel, 300 KB less than what is unpacked."""
    done = _fetch_in_process(tiny, cache, f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit}, {file_limit}))")
    assert done.wait(30) == 3, stage
    assert done.stdout is not None
    message = done.stdout.read()
    assert f"no space is left in {cache}; it needs 13 MB" in message and "$SAMESTEP_CACHE" in message
    assert _visible(cache) == []


def test_an_unwritable_cache_is_named(tiny: Asset, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cache folder .*/file/cache cannot be written \(Not a directory\)"):
        fetch(tiny, tmp_path / "file" / "cache")


@pytest.mark.parametrize("moment", ["download", "unpack"])
def test_a_killed_fetch_leaves_nothing_visible_and_the_next_one_succeeds(tiny: Asset, cache: Path, moment: str) -> None:
    victim = _fetch_in_process(tiny, cache, f"stop_at = {moment!r}")
    pattern = ".tiny-*/requirements.txt" if moment == "download" else ".tiny-*/files/data.bin"
    deadline = time.monotonic() + 30
    while not list(cache.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait(30)
    assert not (cache / "tiny").exists()
    assert list(cache.glob(".tiny-*")), "it was killed before it began"
    assert (fetch(tiny, cache) / "deep" / "note.txt").read_text() == "kept"
    assert _visible(cache) == ["tiny"]


def test_processes_that_fetch_at_once_all_get_the_whole_asset(tiny: Asset, cache: Path) -> None:
    processes = [_fetch_in_process(tiny, cache, "") for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert _visible(cache) == ["tiny"]


def test_a_folder_put_in_place_of_an_asset_is_what_recipes_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = _small_folder(tmp_path)
    (small / "sst.tsv").write_text("text\tlabel\ngood\tpositive\nbad\tnegative\n")
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    assert put_asset("sst", small) == tmp_path / "cache" / "sst"
    assert asset_path("sst") == tmp_path / "cache" / "sst"
    assert len((asset_path("sst") / "sst.tsv").read_text().splitlines()) == 3
    assert _visible(tmp_path / "cache") == ["sst"]


def _fetch_in_process(asset: Asset, cache: Path, prelude: str) -> subprocess.Popen[str]:
    """A process group that fetches; a DataError is printed and exits with 3; stop_at="unpack" makes unpacking hang."""
    code = f"""
import resource, time, zipfile
from pathlib import Path
from trainer.data.fetch import Asset, fetch
from trainer.errors import DataError
stop_at = ""
{prelude}

def unpack(archive, folder):
    with zipfile.ZipFile(archive) as wheel:
        content = wheel.read("samestep_tiny_asset/data.bin")
        (folder / "data.bin").write_bytes(content if stop_at else content * 2)
        if stop_at == "unpack":
            time.sleep(60)
        (folder / "note.txt").write_bytes(wheel.read("samestep_tiny_asset/note.txt"))

try:
    fetch(Asset({asset.name!r}, {asset.package!r}, {asset.form!r}, {asset.sha256!r}, 1, unpack), Path({str(cache)!r}))
except DataError as error:
    print(error)
    raise SystemExit(3)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
