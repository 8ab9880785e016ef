"""Every script explains itself: what it does, and each of its options."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = [path for path in sorted(ROOT.glob("scripts/*.py")) if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("script", [*COMMANDS, ROOT / "examples" / "client.py"], ids=lambda path: path.stem)
def test_help_says_what_a_script_does_and_what_each_option_means(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parsers: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_known_args

    def remember(self: argparse.ArgumentParser, *arguments: object) -> object:
        parsers.append(self)
        return parse(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", remember)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")
    (parser,) = parsers
    assert len(parser.description or "") > 20
    assert [action.option_strings or action.dest for action in parser._actions if not action.help] == []
