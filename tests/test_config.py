"""Settings are complete and checked before anything is touched."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

import slackfit
from config import Command, Config, ConfigError, parse_arguments

ROOT = Path(__file__).parents[1]


def test_the_command_line_without_arguments_gives_the_defaults() -> None:
    assert parse_arguments([]) == Command(Config(), check=False)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1), ("port", 65536), ("workers", 0), ("threads", -1), ("max_queue", 0), ("max_slo_ms", 0),
        ("max_in_flight", 0),
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
        "max_pixels": 8, "max_in_flight": 9, "table_dir": Path("tables"), "drain_timeout_s": 9.5, "summary_s": 10.5,
        "hang_timeout_s": 11.5, "memory_budget": "2.5x", "api_key_file": Path("keys"), "tls_cert": Path("cert.pem"),
        "tls_key": Path("key.pem"), "allow_origin": "https://example.com", "max_connections": 12,
        "max_header_bytes": 4096, "max_upload_bytes": 13, "header_timeout_s": 14.5, "body_timeout_s": 15.5,
        "idle_timeout_s": 16.5, "max_queue_bytes": 17, "dtype": "bfloat16",
    }  # fmt: skip
    switches = ["autoprofile", "correction", "open_metrics"]
    arguments = ["--no-" + name.replace("_", "-") for name in switches]
    for name, value in given.items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    assert {field.name for field in dataclasses.fields(Config)} == {*given, *switches}
    assert dataclasses.asdict(parse_arguments(arguments).config) == given | dict.fromkeys(switches, False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "99999"], "port must be between 0 and 65535"),
        (["--workers", "two"], "--workers"),
        (["--prot", "1"], "unknown argument --prot; did you mean '--port'?"),
        (["--po", "1"], "unknown argument --po; did you mean '--port'?"),
        (["8000"], "unknown argument 8000; known: --allow-origin, --api-key-file, --autoprofile, "),
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
    assert "--config FILE" in shown
    assert "--check" in shown


def test_threads_are_shared_between_the_workers_and_never_none() -> None:
    assert Config(threads=5, workers=3).threads_per_worker == 5
    assert Config(workers=64).threads_per_worker >= 1


# ------------------------------------------------------------------------------------------------------------- the file


def written(folder: Path, text: str) -> str:
    file = folder / "server.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def problems_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What ``--check`` says of settings that cannot be."""
    with pytest.raises(SystemExit) as exit:
        parse_arguments([*arguments, "--check"])
    assert exit.value.code == 1
    return capsys.readouterr().out.splitlines()


def test_a_file_sets_what_flags_set_under_the_same_names(tmp_path: Path) -> None:
    text = (
        'profile = "p"\ntable-dir = "/t"\nhost = "::1"\nport = 1\nmargin = 1\nmax-queue = 2\nmax_in_flight = 3\n'
        'memory-budget = "2x"\nautoprofile = false\ncorrection = true\n'
    )
    expected = Config(
        profile=tmp_path / "p", table_dir=Path("/t"), host="::1", port=1, margin=1, max_queue=2, max_in_flight=3,
        memory_budget="2x", autoprofile=False, correction=True,
    )  # fmt: skip
    assert parse_arguments(["--config", written(tmp_path, text)]) == Command(expected)


def test_an_empty_file_leaves_the_defaults(tmp_path: Path) -> None:
    assert parse_arguments(["--config", written(tmp_path, "# nothing\n")]).config == Config()


def test_flags_win_over_the_file_in_both_directions(tmp_path: Path) -> None:
    file = written(tmp_path, "port = 1\nautoprofile = false\nmax-queue = 5\n")
    config = parse_arguments(["--port", "2", "--config", file, "--autoprofile", "--no-correction"]).config
    assert config == Config(port=2, autoprofile=True, max_queue=5, correction=False)


def test_a_flag_wins_over_an_impossible_value_of_the_file(tmp_path: Path) -> None:
    assert parse_arguments(["--config", written(tmp_path, "port = 99999"), "--port", "1"]).config.port == 1


BAD_FILES = {
    # text: what the one problem says after the file's name
    "prot = 1": "unknown key 'prot'; did you mean 'port'?",
    "max-quue = 1": "unknown key 'max-quue'; did you mean 'max_queue'?",
    "no-autoprofile = true": "unknown key 'no-autoprofile'; did you mean 'autoprofile'?",
    "check = true": "unknown key 'check'; known: allow_origin, api_key_file, autoprofile, ",
    "[server]\nport = 1": "unknown key 'server'",
    'port = "1"': "port must be a whole number, not a string",
    "port = 1.0": "port must be a whole number, not 1.0",
    "port = true": "port must be a whole number, not true or false",
    "margin = [1]": "margin must be a number, not an array",
    "default-slo-ms = true": "default-slo-ms must be a number, not true or false",
    "autoprofile = 1": "autoprofile must be true or false, not 1",
    "memory_budget = 2": "memory_budget must be a string, not 2",
    "profile.name = 1": "profile must be a string, not a table",
    "host = 2026-01-01": "host must be a string, not 2026-01-01",
    "max-queue = 1\nmax_queue = 1": "max_queue is there twice, with - and with _",
    "port = 99999": "port must be between 0 and 65535, not 99999",
    "margin = nan": "margin must be between 0 and 10, not nan",
    'memory-budget = "much"': "memory_budget must be a number of bytes",
    "port = ": "not TOML: Invalid value",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_what_a_file_cannot_say_is_named_with_the_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text)
    (problem,) = problems_of(["--config", file], capsys)
    assert problem.startswith(f"error: {file}: {BAD_FILES[text]}")
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--config", file])
    assert exit.value.code == 2
    assert f"{file}: {BAD_FILES[text]}" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = problems_of(["--config", str(tmp_path / "none.toml")], capsys)
    assert problem.endswith("none.toml: cannot be read: No such file or directory")
    (problem,) = problems_of(["--config", str(tmp_path)], capsys)
    assert "cannot be read: Is a directory" in problem
    (tmp_path / "latin.toml").write_bytes(b'host = "\xe9"')
    (problem,) = problems_of(["--config", str(tmp_path / "latin.toml")], capsys)
    assert "latin.toml: not TOML: 'utf-8' codec" in problem


def test_check_finds_all_that_is_wrong_with_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, 'prot = 1\nworkers = "two"\nport = -1\n')
    found = problems_of(["--config", file, "--margin", "11", "--memory-budget", "x"], capsys)
    named = ["unknown key 'prot'", "workers must be a whole number", "margin must be", "memory_budget must be"]
    assert [line for line in found if not any(name in line for name in named)] == [
        f"error: {file}: port must be between 0 and 65535, not -1"
    ]
    assert len(found) == 5


def test_all_impossible_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Config(port=-1, workers=0, memory_budget="x")
    assert [problem.split()[0] for problem in error.value.problems] == ["port", "workers", "memory_budget"]


def test_check_is_passed_on_with_good_settings() -> None:
    assert parse_arguments(["--check", "--port", "1"]) == Command(Config(port=1), check=True)


def test_settings_need_no_torch() -> None:
    code = "import sys, config; config.parse_arguments([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
