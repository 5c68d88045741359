"""What the code may look like: who imports whom, who may name a backend, how long files and functions are."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("trainer.errors", "trainer.config", "trainer.quiet", "trainer.faults", "trainer.progress"),
    ("trainer.checkpoint.direct", "trainer.stop", "trainer.run_folder", "trainer.versions"),
    ("trainer.checkpoint.manifest",),
    ("trainer.checkpoint.store", "trainer.checkpoint.state"),
    ("trainer.checkpoint.resume", "trainer.divergence"),
    ("trainer.backend", "trainer.data", "trainer.screen", "trainer.plots"),
    ("trainer.model", "trainer.loss", "trainer.metrics", "trainer.entities", "trainer.spans"),
    ("trainer.optim", "trainer.data.classify", "trainer.predict"),
    ("trainer.resolve", "trainer.evaluate", "trainer.log"),
    ("trainer.task",),
    ("trainer.output", "trainer.probe", "trainer.checkpoint", "trainer.watchdog"),
    ("trainer.loop",),
    ("recipes", "launch"),
)
"""A unit imports from itself and from units of layers above it in this table. A unit is a module or a package; the longest
name counts, so that data.classify, which asks the model for its tokenizer, stands above the rest of data."""

BACKEND_NAMES = re.compile(r"fsdp|deepspeed|gloo|(?<![a-z])zero[123]", re.IGNORECASE)
MAY_NAME_BACKENDS = {
    "trainer/quiet.py",  # names of loggers
    "trainer/versions.py",  # names of packages
    "trainer/resolve/suggest.py",  # what people write into the wrong file
}
"""Outside trainer/backend. launch/ is not asked: its options are the backends' names, and it starts another process."""


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) >= {"trainer": 40, "launch": 5, "recipes": 1}[folders[0]], files
    return files


SOURCES = python_files("trainer") + python_files("launch") + python_files("recipes")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def running_code(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, function bodies too, without `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if is_for_types_only(child):
            assert isinstance(child, ast.If)
            yield from (below for other in child.orelse for below in (other, *running_code(other)))
        else:
            yield child
            yield from running_code(child)


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of what a file imports; `from a import b` as a.b."""
    for node in running_code(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_module(name: str) -> str | None:
    """The module of ours that an imported name lies in."""
    while name not in MODULES:
        if "." not in name:
            return None
        name = name.rpartition(".")[0]
    return name


def unit_of(module: str) -> str:
    units = [u for layer in LAYERS for u in layer if module == u or module.startswith(u + ".")]
    assert units, f"{module} has no place in LAYERS; give it one"
    return max(units, key=len)


def layer_of(unit: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if unit in layer)


def test_every_module_has_a_layer_and_every_entry_a_module() -> None:
    packages = {"trainer"}  # an empty __init__ that belongs to no layer
    units = {unit_of(module) for module in MODULES if module not in packages}
    assert units == {unit for layer in LAYERS for unit in layer}


def test_imports_go_from_later_layers_to_earlier_ones() -> None:
    wrong, seen = [], 0
    for module, path in MODULES.items():
        for name, line in imported_names(path):
            target = own_module(name)
            if module == "trainer" or target is None:
                continue
            seen += 1
            here, there = unit_of(module), unit_of(target)
            if here != there and layer_of(there) >= layer_of(here):
                wrong.append(f"{relative(path)}:{line} ({here}) imports {target} ({there})")
    assert seen > 150
    assert wrong == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    edges = {module: {own_module(name) for name, _ in imported_names(path)} for module, path in MODULES.items()}
    done: set[str | None] = {None}

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for target in edges[module] - {None, module}:
                assert target is not None
                visit(target, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def docstring_lines(tree: ast.AST) -> set[int]:
    """First lines of strings that stand alone: docstrings, and the documentation under a field."""
    return {
        node.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def backend_words(path: Path) -> list[str]:
    """Names and strings of the code, without comments and docstrings, that name a backend."""
    text = path.read_text(encoding="utf-8")
    documentation = docstring_lines(ast.parse(text))
    kept = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return [
        f"{relative(path)}:{token.start[0]}: {token.string}"
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type in kept
        and BACKEND_NAMES.search(token.string)
        and not (token.type == tokenize.STRING and token.start[0] in documentation)
    ]


def test_only_the_backend_package_names_a_backend() -> None:
    found = {relative(path): backend_words(path) for path in python_files("trainer", "recipes")}
    inside = [name for name, words in found.items() if words and name.startswith("trainer/backend/")]
    outside = {name for name, words in found.items() if words and not name.startswith("trainer/backend/")}
    assert len(inside) >= 3  # the search finds what it looks for
    assert {name: found[name] for name in outside - MAY_NAME_BACKENDS} == {}
    assert outside == MAY_NAME_BACKENDS  # an exception that is no longer needed goes


def test_only_the_backend_package_talks_to_other_ranks_or_asks_which_backend_it_is() -> None:
    wrong = []
    for path in SOURCES:
        if relative(path).startswith("trainer/backend/"):
            continue
        wrong += [f"{relative(path)}:{line}: {name}" for name, line in imported_names(path)
                  if name.startswith(("torch.distributed", "deepspeed"))]  # fmt: skip
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "distributed_type":
                wrong.append(f"{relative(path)}:{node.lineno}: distributed_type")
    assert wrong == []


def test_launch_imports_no_torch_at_module_level() -> None:
    modules = sorted(module for module in MODULES if module.startswith("launch"))
    assert "launch.cli" in modules
    code = (
        f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'transformers', 'accelerate'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def function_lengths() -> dict[str, int]:
    return {
        f"{relative(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_no_file_is_longer_than_300_lines() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_functions_are_short() -> None:
    lengths = function_lengths()
    ordered = sorted(lengths.values())
    assert len(ordered) > 300
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert ordered[len(ordered) // 2] <= 12
    assert ordered[len(ordered) * 9 // 10] <= 40


@pytest.mark.parametrize("name", ["utils.py", "common.py", "helpers.py", "manager.py", "misc.py"])
def test_no_file_is_named_after_nothing(name: str) -> None:
    assert [relative(path) for path in SOURCES if path.name == name] == []
