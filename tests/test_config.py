"""Settings are complete and checked before anything is touched."""

import dataclasses
import math
from pathlib import Path

import pytest

import slackfit
from config import Config, ConfigError, parse_arguments


def test_the_command_line_without_arguments_gives_the_defaults() -> None:
    assert parse_arguments([]) == Config()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1), ("port", 65536), ("workers", 0), ("threads", -1), ("max_queue", 0), ("max_slo_ms", 0),
        ("default_slo_ms", 0), ("default_slo_ms", math.nan), ("default_slo_ms", math.inf), ("max_body_bytes", 0),
        ("max_pixels", 0), ("drain_timeout_s", -1), ("drain_timeout_s", math.nan), ("summary_s", -0.1),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be between .* and .*, not "):
        Config(**{name: value})


def test_the_default_slo_is_one_that_a_request_may_state() -> None:
    with pytest.raises(ConfigError, match=r"default_slo_ms must be between 0\.1 and 50, not 100"):
        Config(max_slo_ms=50)


def test_every_setting_has_a_flag_that_sets_it() -> None:
    given = {
        "profile": Path("elsewhere"), "host": "::1", "port": 1, "device": "cpu", "policy": "slackfit:4", "workers": 2,
        "threads": 3, "margin": 0.5, "max_queue": 4, "default_slo_ms": 5.5, "max_slo_ms": 60.0, "max_body_bytes": 7,
        "max_pixels": 8, "drain_timeout_s": 9.5, "summary_s": 10.5, "memory_budget": "2.5x",
    }  # fmt: skip
    switches = ["autoprofile", "correction"]
    arguments = ["--no-" + name for name in switches]
    for name, value in given.items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    assert {field.name for field in dataclasses.fields(Config)} == {*given, *switches}
    assert dataclasses.asdict(parse_arguments(arguments)) == given | dict.fromkeys(switches, False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "99999"], "port must be between 0 and 65535"),
        (["--workers", "two"], "--workers"),
        (["--prot", "1"], "--prot"),
        (["8000"], "8000"),
        (["--default-slo-ms", "nan"], "default_slo_ms must be between"),
    ],
)
def test_bad_usage_exits_with_2_and_names_the_argument(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_arguments(arguments)
    assert exit.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_help_teaches_every_flag_and_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for name in slackfit.POLICIES:
        assert f"\n  {name} " in shown
    for field in dataclasses.fields(Config):
        flag = field.name.replace("_", "-")
        assert f"--{flag} X" in shown or f"--no-{flag}" in shown


def test_threads_are_shared_between_the_workers_and_never_none() -> None:
    assert Config(threads=5, workers=3).threads_per_worker == 5
    assert Config(workers=64).threads_per_worker >= 1
