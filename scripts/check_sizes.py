"""Size as a budget: counts code lines of modules and functions, prints a table, and fails when a limit is passed.

Code lines are those left without blank lines, comments and docstrings. A module holds one concept in at most 500 of
them (an architecture family in 300). Over the whole project the median function has at most 10 and the 90th percentile
at most 30; no function has more than 60.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PATTERNS = ("*.py", "supernets/**/*.py", "web/**/*.py", "scripts/**/*.py")
MODULE_LIMIT, FAMILY_LIMIT = 500, 300
FUNCTION_LIMITS = {50: 10, 90: 30, 100: 60}  # percentile: code lines

_LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Function:
    """One function or method: where it starts and its code lines, from ``def`` on."""

    name: str
    first_line: int
    lines: int


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its code lines, how many it may have, and its functions."""

    path: str
    lines: int
    limit: int
    functions: tuple[Function, ...]


def code_lines(source: str, tree: ast.AST) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for docstring in docstrings(tree):
        lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines - {number for number, line in enumerate(source.splitlines(), 1) if not line.strip()}


def docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    """The docstrings of a module and of everything in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body[:1]:
                case [ast.Expr(value=ast.Constant(value=str())) as first]:
                    yield first


def measure(source: str, path: str = "<string>") -> Module:
    """Sizes of one module; raises SyntaxError if it is none."""
    tree = ast.parse(source, path)
    lines = code_lines(source, tree)
    functions = [
        Function(node.name, node.lineno, len(lines.intersection(range(node.lineno, (node.end_lineno or 0) + 1))))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    limit = FAMILY_LIMIT if path.startswith("supernets/") else MODULE_LIMIT
    return Module(path, len(lines), limit, tuple(functions))


def measure_project(root: Path) -> list[Module]:
    """Sizes of all modules below the project's root, sorted by path."""
    paths = sorted({path.relative_to(root).as_posix() for pattern in PATTERNS for path in root.glob(pattern)})
    return [measure((root / path).read_text(encoding="utf-8"), path) for path in paths]


def percentile(sizes: Sequence[int], percent: int) -> int:
    """Nearest-rank percentile; 0 where there is nothing."""
    return sorted(sizes)[max(math.ceil(len(sizes) * percent / 100), 1) - 1] if sizes else 0


def violations(modules: Sequence[Module]) -> list[str]:
    """What is too large, one line each."""
    found = [f"{m.path}: {m.lines} code lines, at most {m.limit} allowed" for m in modules if m.lines > m.limit]
    longest = FUNCTION_LIMITS[100]
    for module in modules:
        for function in module.functions:
            if function.lines > longest:
                where = f"{module.path}:{function.first_line}: {function.name}"
                found.append(f"{where} has {function.lines} code lines, at most {longest} allowed")
    sizes = [function.lines for module in modules for function in module.functions]
    for percent in (50, 90):
        size, limit = percentile(sizes, percent), FUNCTION_LIMITS[percent]
        if size > limit:
            found.append(f"functions: {percent}th percentile is {size} code lines, at most {limit} allowed")
    return found


def table(modules: Sequence[Module]) -> str:
    """One row per module and one for the project."""
    rows = [f"{'module':28} {'lines':>5} {'limit':>5} {'functions':>9} {'median':>6} {'p90':>4}  longest"]
    for module in modules:
        longest = max(module.functions, key=lambda function: function.lines, default=None)
        rows.append(_row(module.path, module.lines, str(module.limit), [f.lines for f in module.functions], longest))
    every = [function for module in modules for function in module.functions]
    total = sum(module.lines for module in modules)
    rows.append(_row("all", total, "", [f.lines for f in every], max(every, key=lambda f: f.lines, default=None)))
    return "\n".join(rows)


def _row(title: str, lines: int, limit: str, sizes: Sequence[int], longest: Function | None) -> str:
    numbers = f"{lines:5} {limit:>5} {len(sizes):9} {percentile(sizes, 50):6} {percentile(sizes, 90):4}"
    return f"{title:28} {numbers}  {longest.lines} {longest.name}" if longest else f"{title:28} {numbers}  -"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exit with the list of what is too large, if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[1], help="default: this project")
    root = parser.parse_args(arguments).root
    try:
        modules = measure_project(root)
    except SyntaxError as error:
        sys.exit(f"{error.filename}:{error.lineno}: {error.msg}")
    if not modules:
        sys.exit(f"no Python modules in {root}")
    print(table(modules), flush=True)
    if found := violations(modules):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
