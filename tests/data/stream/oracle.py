"""A stream in plain Python, one sample after the other, from the definitions alone: slow, obvious, and no line of it is trainer's.

The generator is SplitMix64's finalizer (Steele et al., OOPSLA 2014), chained over the parts of a key; a permutation is a four-round
Feistel network over the next even power of two, walked until it lands inside.
"""

import json
import struct
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

GAMMA, WORD = 0x9E3779B97F4A7C15, 2**64
IGNORED = -100
Piece = list[int]
"""Tokens of one document, or of a part of it."""


@dataclass(frozen=True)
class Rules:
    """What decides the samples."""

    length: int
    packing: str
    isolate: bool
    seed: int
    window: int
    stages: list[tuple[int, list[float]]]
    """(first sample, weights)."""


def mixed(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def key(*parts: int) -> int:
    state = 0
    for part in parts:
        state = mixed((state + part + GAMMA) % WORD)
    return state


def shuffled(items: list[Any], secret: int) -> list[Any]:
    """Place i gets the item that the network sends i to."""
    bits = 2
    while 2**bits < len(items):
        bits += 2
    half = 2 ** (bits // 2)
    result = []
    for place in range(len(items)):
        number = place
        while True:
            left, right = divmod(number, half)
            for turn in range(4):
                left, right = right, left ^ mixed((right + secret + turn * GAMMA) % WORD) % half
            number = left * half + right
            if number < len(items):
                break
        result.append(items[number])
    return result


def documents_of(folder: Path) -> list[list[Piece]]:
    """The documents of every shard, from the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    kind, size = ("H", 2) if manifest["dtype"] == "uint16" else ("I", 4)
    shards = []
    for shard in manifest["shards"]:
        content = (folder / shard["file"]).read_bytes()[shard["data_offset"] :]
        tokens = list(struct.unpack(f"<{shard['tokens']}{kind}", content[: shard["tokens"] * size]))
        ends = [end for (end,) in struct.iter_unpack("<Q", (folder / shard["ends"]).read_bytes())]
        shards.append([tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)])
    return shards


def rows_of(documents: list[Piece], rules: Rules) -> list[list[Piece]]:
    """The rows of a shard, each as its pieces."""
    return concatenated(documents, rules.length) if rules.packing == "concat" else best_fit(documents, rules.length)


def concatenated(documents: list[Piece], length: int) -> list[list[Piece]]:
    """Token after token; a row that is not full at the end is left out."""
    rows: list[list[Piece]] = [[]]
    for document in documents:
        fresh = True
        for token in document:
            if sum(map(len, rows[-1])) == length:
                rows.append([])
                fresh = True
            if fresh:
                rows[-1].append([])
                fresh = False
            rows[-1][-1].append(token)
    return [row for row in rows if sum(map(len, row)) == length]


def best_fit(documents: list[Piece], length: int) -> list[list[Piece]]:
    """Longest piece first, into the fullest row that has room; of several, the one that has been as full for longest."""
    pieces = [document[at : at + length] for document in documents for at in range(0, len(document), length)]
    held: list[list[int]] = []
    by_age: list[int] = []  # rows, the one that got a piece last at the end
    for number in sorted(range(len(pieces)), key=lambda number: -len(pieces[number])):
        room = {row: length - sum(len(pieces[one]) for one in held[row]) for row in by_age}
        fitting = [row for row in by_age if room[row] >= len(pieces[number])]
        row = min(fitting, key=lambda row: room[row]) if fitting else len(held)
        if row == len(held):
            held.append([])
        else:
            by_age.remove(row)
        by_age.append(row)
        held[row].append(number)
    return [[pieces[number] for number in sorted(row)] for row in held]


def one_pass(shards: list[list[list[Piece]]], secret: int, epoch: int, window: int) -> list[list[Piece]]:
    """All rows of a source in the order of one pass: shards shuffled, then the rows of so many shards together."""
    order = shuffled(shards, key(secret, epoch, 0))
    rows = []
    for first in range(0, len(order), window):
        together = [row for shard in order[first : first + window] for row in shard]
        rows += shuffled(together, key(key(secret, epoch, 1), first))
    return rows


def labels_of(rules: Rules, count: int) -> list[int]:
    """The source of each of the first `count` samples."""
    secret, labels = key(rules.seed, 2**32), []
    shares = [shares_of(weights) for _, weights in rules.stages]
    block = max([1024] + [-(-2 * share.denominator // share.numerator) for one in shares for share in one if share])
    for number, (start, _) in enumerate(rules.stages):
        end = rules.stages[number + 1][0] if number + 1 < len(rules.stages) else count
        found: list[int] = []
        for turn in range(-(-(end - start) // block)):
            before, after = (rounded(shares[number], edge * block) for edge in (turn, turn + 1))
            wanted = [a - b for a, b in zip(after, before, strict=True)]
            names = [source for source, taken in enumerate(wanted) for _ in range(taken)]
            found += shuffled(names, key(secret, number, turn))
        labels += found[: end - start]
    return labels[:count]


def shares_of(weights: list[float]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]
    return [one / sum(exact) for one in exact]


def rounded(shares: list[Fraction], samples: int) -> list[int]:
    """Whole samples of each source among so many: its share and those before it, rounded, less those before it, rounded."""
    edges = [int(sum(shares[:number], Fraction(0)) * samples + Fraction(1, 2)) for number in range(len(shares) + 1)]
    return [last - first for first, last in pairwise(edges)]


def samples_of(folders: list[Path], rules: Rules, count: int) -> list[dict[str, list[int]]]:
    """The first samples of a stream."""
    sources = [[rows_of(documents, rules) for documents in documents_of(folder)] for folder in folders]
    waiting: list[list[list[Piece]]] = [[] for _ in folders]
    passes = [0] * len(folders)
    samples = []
    for source in labels_of(rules, count):
        if not waiting[source]:
            waiting[source] = one_pass(sources[source], key(rules.seed, source), passes[source], rules.window)
            passes[source] += 1
        samples.append(sample_of(waiting[source].pop(0), rules))
    return samples


def sample_of(pieces: list[Piece], rules: Rules) -> dict[str, list[int]]:
    """Input, labels and positions of a row; padding is zeros without targets."""
    ids, labels, positions = [], [], []
    for piece in pieces:
        ids += piece
        labels += [*piece[1:], IGNORED]
        positions += range(len(piece))
    if not rules.isolate:
        labels = [*ids[1:], IGNORED]
    padding = rules.length - len(ids)
    sample = {"input_ids": ids + [0] * padding, "labels": labels + [IGNORED] * padding}
    return sample | ({"position_ids": positions + list(range(padding))} if rules.isolate else {})
