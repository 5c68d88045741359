"""The README's support matrix, from the table of methods and from what tests/distributed/test_methods.py recorded.

python tests/support_matrix.py    # writes it into README.md; `bash launch/test.sh --all` does so after the tests
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, `tests` is not importable

from tests.rank_pool import BACKENDS
from trainer.model.methods import METHODS

README = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = Path(__file__).resolve().parent / "distributed" / "support.json"
MARK = "<!-- support matrix: written by `bash launch/test.sh --all`, checked by tests/test_readme.py -->\n"


def record(method: str, backend: str, result: str) -> None:
    """Note how a cell ended, where SAMESTEP_RECORD is set."""
    if os.environ.get("SAMESTEP_RECORD"):
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        found.setdefault(method, {})[backend] = result
        ordered = {name: found[name] for name in METHODS if name in found}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def matrix() -> str:
    """A row for each method of the table that was tested, a column for each backend."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| method | trains | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 2) + "|"]
    for name, row in METHODS.items():
        if name in results:
            cells = [results[name].get(backend, "-") for backend in BACKENDS]
            lines.append(f"| {name} | {row.words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Put the matrix between the mark and the next empty line."""
    before, mark, after = README.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"README.md has lost the line {MARK}"
    _, _, rest = after.partition("\n\n")
    README.write_text(f"{before}{MARK}{matrix()}\n{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
