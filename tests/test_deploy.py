"""What runs the server elsewhere: the wheel, the container and the systemd unit say what is true of this code."""

import configparser
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import superserve
from config import Config, parse_arguments, read_settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
EXAMPLE = ROOT / "deploy" / "superserve.toml"
SHIPPED = ("*.py", "pyproject.toml", "README.md", "LICENSE", "supernets", "web", "profiles")


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "deploy" / "superserve.service", encoding="utf-8")
    return parser["Service"]


# ------------------------------------------------------------------------------------------------------ settings, unit


def test_the_example_of_a_configuration_file_is_one() -> None:
    problems: list[str] = []
    settings = read_settings(EXAMPLE, problems)
    assert problems == []
    assert Config(**settings) == Config()  # it shows the defaults


def test_the_unit_starts_the_server_with_flags_that_it_has() -> None:
    program, *arguments = unit()["ExecStart"].replace("/etc/superserve.toml", str(EXAMPLE)).split()
    assert program.endswith("/bin/superserve")
    command = parse_arguments(arguments)
    assert command.config.table_dir == Path("${STATE_DIRECTORY}")


def test_the_unit_gives_a_drain_the_time_that_it_may_take() -> None:
    service = unit()
    assert service["KillSignal"] == "SIGTERM"
    longest_s = Config().drain_timeout_s + 15  # docs/survival.md
    assert int(service["TimeoutStopSec"]) >= longest_s
    assert service["Restart"] == "on-failure"
    assert f"code {superserve.EX_LOST} " in (ROOT / "deploy" / "superserve.service").read_text(encoding="utf-8")


def test_the_unit_is_hardened() -> None:
    service = unit()
    for name in ("DynamicUser", "NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces"):
        assert service[name] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "superserve.service").read_text(encoding="utf-8")
    (tmp_path / "superserve.service").write_text(text.replace("/opt/superserve/bin/superserve", "/bin/true"))
    command = ["systemd-analyze", "verify", str(tmp_path / "superserve.service")]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------------ container


def test_the_container_runs_the_server_with_flags_that_it_has_and_not_as_root() -> None:
    found = re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    program, *arguments = json.loads(found[1])
    config = parse_arguments(arguments).config
    assert (program, config.host, config.port) == ("superserve", "0.0.0.0", Config().port)
    user = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert int(user) > 0
    assert str(config.table_dir) in re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)


def test_the_container_is_built_from_listed_files_alone() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in ignored if line and not line.startswith("#")) == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert allowed == {*SHIPPED, "requirements.txt"}


@pytest.fixture
def url() -> Iterator[str]:
    """A server that answers 200 on /healthz, and 404 elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_containers_health_check_tells_alive_from_dead(url: str) -> None:
    found = re.search(r"^HEALTHCHECK .*\\\n\s*CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    program, flag, code = json.loads(found[1])
    assert (program, flag) == ("python", "-c")
    assert f":{Config().port}/" in code
    for address, expected in ((url, 0), (f"{url}/nothing", 1)):
        probe = code.replace(f"http://127.0.0.1:{Config().port}", address)
        ended = subprocess.run([sys.executable, "-c", probe], stderr=subprocess.DEVNULL, check=False)
        assert ended.returncode == expected


# ---------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy, so that no folder build/ is left behind or taken up."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for pattern in SHIPPED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, copy)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_every_module_the_profile_and_the_page(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [path for where in ("*.py", "supernets/*.py", "web/*.py") for path in ROOT.glob(where)]
    modules = {path.relative_to(ROOT).as_posix() for path in sources}
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "web" / "static").rglob("*") if path.is_file()}
    profile = {f"profiles/cifar10/{name}" for name in ("supernet.json", "choices.json", "norms.npz", "weights.npz")}
    assert (modules | page | profile) - names == set()
    assert [name for name in names if name.startswith(("tests", "scripts", "profiles/paper"))] == []


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for arguments, expected in ((["--help"], "usage: superserve"), (["--check", "--device", "cpu"], "cifar10")):
        command = [sys.executable, "-c", "from superserve import main; main()", *arguments]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        assert expected in ended.stdout
    assert str(tmp_path / "site" / "profiles" / "cifar10") in ended.stdout


def test_the_console_command_is_the_server() -> None:
    assert callable(superserve.main)
    assert 'superserve = "superserve:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_setting_is_explained_in_the_manual() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Config)]
    assert [name for name in names if not re.search(rf"`--(no-)?{name}`", manual)] == []
