"""The size budget counts what it says and fails when it is passed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import check_sizes
from check_sizes import measure, percentile, violations

SOURCE = '''"""Module
docstring."""

import os  # trailing comments do not matter

# an own-line comment

class Thing:
    """Docstring."""

    @property
    def name(self) -> str:
        """Docstring.

        of three lines
        """
        text = """two lines of

        text are code"""

        return text


async def wait(
    seconds: float,
) -> None:
    pass
'''


def function_of(lines: int, name: str = "f") -> str:
    """Source of a function with this many code lines."""
    return f"def {name}():\n" + "    pass\n" * (lines - 1)


def test_blank_lines_comments_and_docstrings_do_not_count() -> None:
    assert measure(SOURCE).lines == len(["import", "class", "@property", "def", "text", "text", "return"]) + 4


def test_functions_are_measured_from_their_def() -> None:
    sizes = {function.name: function.lines for function in measure(SOURCE).functions}
    assert sizes == {"name": 4, "wait": 4}


def test_a_string_that_is_no_docstring_counts() -> None:
    assert measure('x = 1\n"""not a docstring"""\n').lines == 2


def test_f_strings_over_several_lines_count() -> None:
    assert measure('x = f"""a\n{1}\n\nb"""\n').lines == 3


def test_semicolons_do_not_make_lines() -> None:
    assert measure("a = 1; b = 2\n").lines == 1


@given(st.lists(st.integers(1, 99), min_size=1), st.integers(1, 100))
def test_percentile_is_the_nearest_rank(sizes: list[int], percent: int) -> None:
    value = percentile(sizes, percent)
    below_or_equal = sum(size <= value for size in sizes)
    below = sum(size < value for size in sizes)
    assert value in sizes
    assert below < len(sizes) * percent / 100 <= below_or_equal


def test_percentile_of_nothing_is_zero() -> None:
    assert percentile([], 90) == 0


@pytest.mark.parametrize(("path", "limit"), [("engine.py", 500), ("scripts/x.py", 500), ("supernets/x.py", 300)])
def test_a_module_may_be_as_long_as_its_limit(path: str, limit: int) -> None:
    assert violations([measure("a = 1\n" * limit, path)]) == []
    assert violations([measure("a = 1\n" * (limit + 1), path)]) == [
        f"{path}: {limit + 1} code lines, at most {limit} allowed"
    ]


def test_a_long_function_is_named_with_its_place() -> None:
    others = [measure(function_of(2), "n.py")] * 9
    assert violations([measure(function_of(60), "m.py"), *others]) == []
    assert violations([measure("\n" + function_of(61, "huge"), "m.py"), *others]) == [
        "m.py:2: huge has 61 code lines, at most 60 allowed"
    ]


def test_functions_are_short_over_the_whole_project() -> None:
    assert violations([measure(function_of(10), "a.py"), measure(function_of(30), "b.py")]) == []
    assert violations([measure(function_of(11), "a.py")]) == [
        "functions: 50th percentile is 11 code lines, at most 10 allowed"
    ]
    assert violations([measure(function_of(2), "a.py"), measure(function_of(31), "b.py")]) == [
        "functions: 90th percentile is 31 code lines, at most 30 allowed"
    ]


def test_a_project_within_its_budget_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "supernets").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "engine.py").write_text(function_of(3, "run"))
    (tmp_path / "supernets" / "empty.py").write_text("")
    (tmp_path / "tests" / "ignored.py").write_text("a = 1\n" * 900)
    check_sizes.main([str(tmp_path)])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["engine.py", "3", "500", "1", "3", "3", "3", "run"],
        ["supernets/empty.py", "0", "300", "0", "0", "0", "-"],
        ["all", "3", "1", "3", "3", "3", "run"],
    ]


def test_a_project_over_its_budget_fails(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "large.py").write_text("a = 1\n" * 501)
    with pytest.raises(SystemExit, match=r"web/large\.py: 501 code lines, at most 500 allowed"):
        check_sizes.main([str(tmp_path)])


def test_a_broken_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text("a = 1\ndef (:\n")
    with pytest.raises(SystemExit, match=r"engine\.py:2: "):
        check_sizes.main([str(tmp_path)])


def test_a_folder_without_modules_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no Python modules"):
        check_sizes.main([str(tmp_path)])


def test_all_docstrings_are_found() -> None:
    assert len(list(check_sizes.docstrings(ast.parse(SOURCE)))) == 3
