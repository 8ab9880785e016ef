"""What the documents say exists: flags, verbs, scripts, files, fields, and the names in superserve.py's opening."""

from __future__ import annotations

import ast
import keyword
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
SOURCES = [path for where in ("*.py", "supernets/**/*.py", "web/**/*.py") for path in sorted(ROOT.glob(where))]
SCRIPTS = sorted(ROOT.glob("scripts/*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
SERVER = re.compile(r"\bsuperserve(?:\.py)?(?=\s)|\bmake serve\b")


# ---------------------------------------------------------------------------------------------------- reading documents


def code_in(text: str) -> Iterator[str]:
    """Commands and snippets in Markdown without comments: lines of code blocks (continued ones joined), inline code."""
    pieces = [line for block in FENCED.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    pieces += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    for piece in pieces:
        yield re.split(r"(?:^|\s)#\s", piece)[0]


def links_in(text: str) -> Iterator[str]:
    """Where the links and pictures of a Markdown text lead inside the project, without anchors."""
    for markdown, html in re.findall(r"\]\(<?([^)\s>]+)|(?:src|href)=\"([^\"]+)\"", FENCED.sub("", text)):
        target = (markdown or html).split("#")[0]
        if target and not re.match(r"[a-z][a-z0-9+.-]*:", target):
            yield target


def verbs_in(code: str) -> list[str]:
    """The targets that a command gives to make."""
    found = re.search(r"(?:^|[\s;&(])make((?: [a-z][\w-]*(?![\w=-]))+)", code)
    return found[1].split() if found else []


def flags_after(program: re.Pattern[str], code: str) -> list[str]:
    """The flags that a command gives to this program."""
    found = program.search(code)
    return FLAG.findall(re.split(r"[|;&]", code[found.end() :])[0]) if found else []


def documented() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)


def source_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ reading sources


class Definitions:
    """Names that the project's modules define, altogether and by class and module."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.scopes: dict[str, set[str]] = {}
        self.bases: dict[str, list[str]] = {}
        for module, source in sources.items():
            tree = ast.parse(source)
            self.scopes[module] = self._names(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.scopes[node.name] = self._names(node)
                    self.bases[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]
        self.all = set(self.scopes).union(*self.scopes.values())

    @staticmethod
    def _names(scope: ast.Module | ast.ClassDef) -> set[str]:
        assigned = [node for node in scope.body if isinstance(node, ast.Assign | ast.AnnAssign)]
        variables = [node for statement in assigned for node in ast.walk(statement) if isinstance(node, ast.Name)]
        inside = list(ast.walk(scope))
        return (
            {node.id for node in variables if isinstance(node.ctx, ast.Store)}
            | {node.name for node in inside if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
            | {node.attr for node in inside if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        )

    def has(self, dotted: str) -> bool:
        """Whether the name exists; after a class or module, whether it exists there."""
        *owners, name = dotted.split(".")
        if owners and owners[-1] in self.scopes:
            return self._has_member(owners[-1], name)
        return name in self.all

    def _has_member(self, owner: str, name: str) -> bool:
        return name in self.scopes.get(owner, ()) or any(self._has_member(b, name) for b in self.bases.get(owner, ()))


def names_in_docstring(docstring: str) -> Iterator[str]:
    """Identifiers in double backticks, calls included; no files, keywords or things of Python's own."""
    for quoted in re.findall(r"``([^`]+)``", docstring):
        found = re.fullmatch(r"([A-Za-z_][\w.]*)(?:\(.*\))?", quoted, re.DOTALL)
        if found is None or keyword.iskeyword(quoted) or (ROOT / quoted).exists():
            continue
        if found[1].split(".")[0] not in sys.stdlib_module_names:
            yield found[1]


def opening() -> str:
    """The module docstring of superserve.py."""
    return ast.get_docstring(ast.parse(source_of(ROOT / "superserve.py"))) or ""


@pytest.fixture(scope="module")
def help_text() -> str:
    """What ``python superserve.py --help`` prints."""
    command = [sys.executable, str(ROOT / "superserve.py"), "--help"]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# --------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.slow
def test_every_flag_is_documented(help_text: str) -> None:
    assert set(FLAG.findall(help_text)) - set(FLAG.findall(documented())) - {"--help"} == set()


@pytest.mark.slow
def test_every_flag_shown_with_the_server_exists(help_text: str) -> None:
    shown = {flag for code in code_in(documented()) for flag in flags_after(SERVER, code)}
    assert shown - set(FLAG.findall(help_text)) == set()


def test_every_script_shown_exists() -> None:
    shown = set(re.findall(r"\bscripts/(\w+\.py)", documented()))
    assert shown - {path.name for path in SCRIPTS} == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_shown_with_a_script_exists(script: Path) -> None:
    program = re.compile(rf"\bscripts/{script.name}(?=\s)")
    shown = {flag for code in code_in(documented()) for flag in flags_after(program, code)}
    assert shown - set(re.findall(r"[\"'](--[a-z0-9-]+)[\"']", source_of(script))) - {"--help"} == set()


def test_every_verb_shown_is_in_the_makefile() -> None:
    shown = {verb for code in code_in(documented()) for verb in verbs_in(code)}
    assert {"serve", "test"} <= shown
    assert shown - set(re.findall(r"^([a-z][\w-]*):", source_of(ROOT / "Makefile"), re.MULTILINE)) == set()


def test_every_verb_is_explained_by_make_help() -> None:
    makefile = source_of(ROOT / "Makefile")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"^([a-z]+):.*## \S", makefile, re.MULTILINE)) == set(phony[1].split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_linked_exists(document: Path) -> None:
    missing = [link for link in links_in(source_of(document)) if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.slow
def test_every_example_named_exists(help_text: str) -> None:
    named = set(re.findall(r"\bexamples/[\w.-]*\w", documented() + help_text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_json_field_shown_exists() -> None:
    shown = {field for code in code_in(documented()) for field in re.findall(r"\"([a-z]\w*)\":", code)}
    known = set(re.findall(r"\w+", "\n".join(source_of(path) for path in SOURCES + SCRIPTS)))
    assert shown - known == set()


def test_superserve_opens_with_the_life_of_one_query() -> None:
    steps = [int(number) for number in re.findall(r"^\s*(\d+)\. ", opening(), re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))
    assert 5 <= len(steps) <= 12
    assert len(list(names_in_docstring(opening()))) >= len(steps)


def test_every_name_in_the_opening_exists() -> None:
    definitions = Definitions({path.stem: source_of(path) for path in SOURCES})
    assert [name for name in names_in_docstring(opening()) if not definitions.has(name)] == []


def test_the_package_holds_every_module() -> None:
    listed = PROJECT["tool"]["setuptools"]["py-modules"]
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("*.py"))


def test_no_aiohttp_is_allowed_that_inflates_without_limit() -> None:
    (lowest,) = re.findall(r"^aiohttp>=([\d.]+)", "\n".join(PROJECT["project"]["dependencies"]), re.MULTILINE)
    # Fixed in 3.13.3 (CVE-2025-69223), 3.14.1 (PYSEC-2026-2111) and 3.14.4 (CVE-2026-128131).
    assert tuple(map(int, lowest.split("."))) >= (3, 14, 4)


def test_requirements_lie_in_the_ranges_of_the_package() -> None:
    lowest = dict(re.findall(r"^([a-z-]+)>=([\d.]+)", "\n".join(PROJECT["project"]["dependencies"]), re.MULTILINE))
    pinned = dict(re.findall(r"^([a-z-]+)==([\d.]+)", source_of(ROOT / "requirements.txt"), re.MULTILINE))

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    assert pinned.keys() == lowest.keys()
    assert [name for name in pinned if numbers(pinned[name]) < numbers(lowest[name])] == []


# ------------------------------------------------------------------------------------- the readers above read correctly


def test_reading_code_joins_continued_lines_and_drops_comments() -> None:
    text = "Run `make test`.\n```sh\npython superserve.py \\\n  --port 1  # not --this\n```\n"
    assert [code.split() for code in code_in(text)] == [["python", "superserve.py", "--port", "1"], ["make", "test"]]


def test_reading_flags_takes_those_of_the_program_alone() -> None:
    assert flags_after(SERVER, "sh --a && make serve PORT=1 ARGS='--policy x' | jq --b") == ["--policy"]
    assert flags_after(SERVER, "curl --data-binary @cat.jpg") == []


def test_reading_verbs_leaves_settings_out() -> None:
    assert verbs_in("PORT=1 make check test ARGS='-k x'") == ["check", "test"]
    assert verbs_in("cmake all") == []


def test_reading_links_leaves_addresses_and_anchors_out() -> None:
    text = '[a](docs/a.md#b) [c](#d) [e](https://f) ![g](g.png)\n<img src="h.png">'
    assert list(links_in(text)) == ["docs/a.md", "g.png", "h.png"]


def test_definitions_know_members_of_classes_and_their_bases() -> None:
    source = "class A:\n    x: int\n    def f(self):\n        self.y = local = 1\nclass B(A):\n    pass\nz = 1\n"
    definitions = Definitions({"m": source})
    for name in ("A", "A.x", "B.f", "B.y", "m.z", "thing.f", "z", "m"):
        assert definitions.has(name), name
    for name in ("A.z", "m.q", "local", "C"):
        assert not definitions.has(name), name


def test_names_in_a_docstring_may_be_calls() -> None:
    text = "``Dispatcher.submit`` ``decide(heap, now)`` ``POST /predict`` ``None`` ``time.sleep`` ``README.md x``"
    assert list(names_in_docstring(text)) == ["Dispatcher.submit", "decide"]
