"""Files and folders that are made from what this machine has, once, and kept in the cache.

Invariant: they are made where nothing else deletes: trainer/data/fetch.py, which `make` may call, clears all that begins with its asset's
name, and one name may begin with another.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trainer.data.assets import cache_folder
from trainer.errors import DataError


def made_once(name: str, make: Callable[[Path], None], *, is_whole: Callable[[Path], bool] = Path.exists) -> Path:
    """`name` in the cache, which `make` writes at first use. Any number of processes may call it. DataError for a full disk.

    make: writes the file or folder at the path it is given; what it leaves beside that is dropped. What is not whole is made anew.
    """
    cache = cache_folder()
    target = cache / name
    if is_whole(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name}.lock"):
            if not is_whole(target):
                staging = cache / f".making-{name}"
                shutil.rmtree(staging, ignore_errors=True)  # of a call that was killed: we hold the lock
                staging.mkdir()
                try:
                    make(staging / name)
                    shutil.rmtree(target, ignore_errors=True)
                    (staging / name).rename(target)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{error.filename or cache} cannot be written: {error.strerror}; set SAMESTEP_CACHE") from None
    return target
