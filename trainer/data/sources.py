"""What a `source` names: an asset, a file, or a hub dataset; and the table it holds.

Between the settings and trainer/data/tables.py. The rule, in this order: `asset:NAME`; a path that exists; a name that
can only be a path (a suffix of ours, a leading dot, slash or tilde, several slashes), which is then missing; a hub id.
"""

import os  # os.path answers where pathlib raises: a name too long, a folder that may not be entered
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import ClassificationData
from trainer.data.tables import READERS, Table, check_columns, read_file
from trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_source(data: ClassificationData, columns: Mapping[str, str]) -> Table:
    """The table of `data.source`; of a hub dataset, its split `train`. DataError says what was tried."""
    source = data.source
    if source.startswith("asset:"):
        return _read_asset(source, columns)
    if is_hub_id(source):
        return _read_hub(data, "data.source", "train", columns)
    return _read_path(source, "data.source", columns)


def read_named_split(data: ClassificationData, setting: str, name: str, columns: Mapping[str, str]) -> Table:
    """The table of `data.validation` or `data.test`: a file, or a split of the hub dataset that `data.source` names."""
    path = Path(name).expanduser()
    if os.path.isfile(path) or path.suffix.lower() in READERS or name.startswith((".", "/", "~")):
        return _read_path(name, setting, columns)
    if is_hub_id(data.source):
        return _read_hub(data, setting, name, columns)
    raise DataError(
        f"{setting} ({name}): there is no such file{_near(Path(name))}, and a split name works only where data.source is "
        f"a hub dataset, not {data.source}; give a file, or none to cut the split from the source"
    )


def is_hub_id(source: str) -> bool:
    """Whether a source is neither an asset nor a path, and is written as hub ids are: `name` or `owner/name`."""
    path = Path(source).expanduser()
    if os.path.exists(path) or path.suffix.lower() in READERS:
        return False
    return HUB_ID.fullmatch(source) is not None


def _read_asset(source: str, columns: Mapping[str, str]) -> Table:
    from trainer.data.assets import asset_path

    name = source.removeprefix("asset:")
    path = asset_path(name) / f"{name}.tsv"
    if not path.exists():
        raise DataError(
            f"data.source ({source}) is an asset without sentences, such as a model; use asset:sst or a file"
        )
    return read_file(path, columns, kind="asset")


def _read_path(source: str, setting: str, columns: Mapping[str, str]) -> Table:
    return read_file(check_path(source, setting), columns)


def check_path(source: str, setting: str) -> Path:
    """The path that a setting names. DataError where nothing is there."""
    path = Path(source).expanduser()
    if not os.path.exists(path):
        raise DataError(
            f"{setting} ({source}): there is no such file{_near(path)}; give a file that exists, or a hub id"
        )
    return path


def _near(path: Path) -> str:
    """A similar name in the same folder, or the folder that is missing too."""
    folder = path.parent
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f" ({folder}: {error.strerror})"
    near = get_close_matches(path.name, names, n=3) or [name for name in names if Path(name).stem == path.name]
    return f" (did you mean {', '.join(str(folder / name) for name in near)}?)" if near else f" in {folder.absolute()}"


def _read_hub(data: ClassificationData, setting: str, split: str, columns: Mapping[str, str]) -> Table:
    """A split of a hub dataset, downloaded or from the hub's own cache."""
    return hub_table(load_hub(data.source, data.subset, split, setting), f"{data.source}[{split}]", columns)


def hub_table(dataset: "Dataset", name: str, columns: Mapping[str, str]) -> Table:
    """Columns of a loaded dataset."""
    check_columns(name, dataset.column_names, columns)
    wanted = dataset.select_columns(list(dict.fromkeys(columns.values())))
    class_names = {
        column: tuple(names)
        for column, feature in wanted.features.items()
        if (names := getattr(getattr(feature, "feature", feature), "names", None))  # of a list: what its items are
    }
    return Table(name, "hub dataset", wanted[:], range(1, len(wanted) + 1), has_lines=False, class_names=class_names)


def load_hub(source: str, subset: str | None, split: str, setting: str) -> "Dataset":
    """A split of a hub dataset. DataError says what was tried; setting: where its name stands."""
    from datasets import load_dataset  # a second or two that files do not pay
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(source, subset, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(" .")
        raise DataError(
            f"{setting} ({source if setting == 'data.source' else split}): there is no such file"
            f"{_near(Path(source)) if setting == 'data.source' else ''}, and split {split} of the hub dataset "
            f"{source}{f', subset {subset},' if subset else ''} cannot be loaded ({reason}); check the "
            "names, the network and HF_HUB_OFFLINE, or give a local .csv .tsv .jsonl or .parquet file as "
            f"{setting}=PATH"
        ) from None
