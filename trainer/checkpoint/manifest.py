"""manifest.json: what a checkpoint holds, to the byte. A folder without a readable one is no checkpoint. Imports no torch.

Place in the flow: written last, after every file is on disk and hashed; read first. The manifest's own checksum covers its
content, so an edited one is found out like a flipped bit in a shard.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from trainer.checkpoint.direct import read_chunks
from trainer.errors import CheckpointError

MANIFEST, STATE = "manifest.json", "state.json"
TEMPLATE = "chat_template.jinja"
"""transformers' name for it; what a run on conversations is asked with."""
SMALL_FILES = "state|config|adapter_config|bottleneck_config|samestep|tokenizer|tokenizer_config"
FILE_NAME = rf"(weights|optimizer|rank)-\d{{5}}-of-\d{{5}}\.safetensors|({SMALL_FILES})\.json|{re.escape(TEMPLATE)}"
LARGEST_JSON = 64 * 2**20  # bytes; a bigger manifest or state was not written by us

FileName = Annotated[str, Field(pattern=f"^({FILE_NAME})$")]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Nothing is converted, nothing unknown is accepted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class FileEntry(Strict):
    """One file of a checkpoint."""

    size: NonNegativeInt
    """Bytes."""
    blake3: Hash
    """Of the whole file."""


class Manifest(Strict):
    """Everything needed to verify a checkpoint and to read it under another backend and world size."""

    format: Literal["samestep-checkpoint-1"]
    step: NonNegativeInt
    """Optimizer steps taken."""
    backend: str
    """That wrote it."""
    world_size: PositiveInt
    """Ranks that wrote it."""
    precision: str
    """Of the forward pass; the tensors are the fp32 masters."""
    metric: float | None
    """The watched validation metric at this step; None where it was not evaluated here."""
    config_hash: Hash
    """Of the config in state.json."""
    versions: dict[str, str]
    """Of the libraries that took part."""
    tensors: dict[str, list[NonNegativeInt]]
    """kind/name of every tensor and its whole shape."""
    files: dict[FileName, FileEntry]
    """All other files of the folder."""


def manifest_text(manifest: Manifest) -> str:
    """The file's content: the manifest and a checksum over it."""
    content = manifest.model_dump(mode="json")
    return json.dumps(content | {"checksum": checksum(content)}, indent=1, sort_keys=True) + "\n"


def checksum(content: dict[str, Any]) -> str:
    """BLAKE3 of a JSON object, whatever its layout."""
    return blake3(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. CheckpointError says what is wrong with it."""
    content = read_json(folder / MANIFEST)
    stated = content.pop("checksum", None)
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))  # JSON mode: strict, and lists stay lists
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        raise CheckpointError(f"{folder / MANIFEST}: {place}: {first['msg']}") from None
    if stated != checksum(content):
        raise CheckpointError(f"{folder / MANIFEST} was edited: its checksum does not match its content")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of bearable size; CheckpointError otherwise."""
    require_regular(path)
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} is larger than {LARGEST_JSON >> 20} MiB, which samestep never writes")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def require_regular(path: Path) -> None:
    """CheckpointError unless the path is a file itself: no link, no device, no folder."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file; a checkpoint holds no links")


def hash_file(path: Path) -> FileEntry:
    """Size and BLAKE3 as they are on disk now."""
    digest, size = blake3(), 0
    for chunk in read_chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return FileEntry(size=size, blake3=digest.hexdigest())


def write_synced(path: Path, content: bytes) -> FileEntry:
    """Write a new file and have it on disk when this returns."""
    with path.open("xb") as file:
        file.write(content)
        sync(file)
    return FileEntry(size=len(content), blake3=blake3(content).hexdigest())


def sync(file: BinaryIO) -> None:
    """Flush a file's content to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, so that a file that was written there is still there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file_name(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name."""
    return re.fullmatch(FILE_NAME, name) is not None
