"""Who may ask what: keys, origins, certificates, and what is told at the start of what lets more in."""

import asyncio
import json
import logging
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSServerHandshakeError, web
from aiohttp.test_utils import TestClient, TestServer
from serving import config_of, image_array, listening_app
from yarl import URL

import startup
from config import Config, ConfigError
from logs import JsonLines
from startup import Finding, check
from superserve import SERVE, make_app
from web.access import AccessError, is_loopback, load_keys, load_tls
from web.listen import ConnectionLimits

Client = TestClient[web.Request, web.Application]

ROOT = Path(__file__).parents[1]
FIRST, SECOND = "first-key-0123456789", "second-key-abcdefghij"
PIXELS = image_array(0).tobytes()
CLOSED = (
    ("GET", "/profile"), ("GET", "/live"), ("GET", "/openapi.json"), ("GET", "/metrics"), ("GET", "/v2"),
    ("GET", "/v2/models/tiny"), ("GET", "/v2/models/tiny/ready"), ("GET", "/stream"), ("POST", "/predict"),
    ("POST", "/v2/models/tiny/infer"), ("POST", "/v2/repository/index"), ("GET", "/none"), ("DELETE", "/predict"),
)  # fmt: skip
OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/", "/static/app.js")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file of two keys."""
    return written(tmp_path / "keys", f"# of the camera\n{FIRST}\n\n  {SECOND}  \n")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cert.pem and key.pem for localhost, and other.pem, the key of another certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    for cert, key in (("cert.pem", "key.pem"), ("another.pem", "other.pem")):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", key, "-out", cert], cwd=folder, check=True, capture_output=True)
        (folder / key).chmod(0o600)
    return folder


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


@asynccontextmanager
async def serving_app(config: Config) -> AsyncIterator[Client]:
    app = make_app(config)
    async with TestClient(TestServer(app)) as client:
        await app[SERVE].start_soon()
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --------------------------------------------------------------------------------------------------------------- keys


async def test_without_a_key_only_health_and_the_files_of_the_page_are_answered(profile: Path, keys: Path) -> None:
    async with serving_app(config_of(profile, api_key_file=keys)) as client:
        for method, path in CLOSED:
            response = await client.request(method, path)
            assert (response.status, response.content_type) == (401, "application/json"), path
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="superserve"'
            document = await response.json()
            assert document["reason"] == "unauthorized"
            assert "X-API-Key" in document["error"]
        for path in OPEN:
            assert (await client.get(path)).status == 200, path


@pytest.mark.parametrize(
    "headers",
    [
        bearer(FIRST), bearer(SECOND), {"Authorization": f"bearer   {FIRST} "}, {"X-API-Key": SECOND},
        {"Authorization": "Basic eDp5", "X-API-Key": FIRST},
    ],
)  # fmt: skip
async def test_a_known_key_is_accepted_in_either_header(profile: Path, keys: Path, headers: dict[str, str]) -> None:
    async with serving_app(config_of(profile, api_key_file=keys)) as client:
        assert (await client.post("/predict", data=PIXELS, headers=headers)).status == 200
        for path in ("/profile", "/metrics", "/live", "/openapi.json", "/v2/models/tiny"):
            assert (await client.get(path, headers=headers)).status == 200, path
        raw = {**headers, "Inference-Header-Content-Length": "0"}
        assert (await client.post("/v2/models/tiny/infer", data=PIXELS, headers=raw)).status == 200
        async with client.ws_connect("/stream", headers=headers) as socket:
            await socket.send_bytes(b"\x09\0\0\0" + b'{"id": 1}' + PIXELS)
            assert (await socket.receive_json())["id"] == 1
        assert (await client.get("/none", headers=headers)).status == 404


@pytest.mark.parametrize(
    "headers",
    [
        bearer("no-such-key-here"), bearer(FIRST[:-1]), bearer(FIRST + "x"), bearer(""), bearer(FIRST.upper()),
        {"Authorization": FIRST}, {"Authorization": f"Basic {FIRST}"}, {"X-API-Key": ""},
        {"X-API-Key": "# of the camera"},
        {"Cookie": f"key={FIRST}"}, {"Sec-WebSocket-Protocol": FIRST}, bearer("schlüssel-schlüssel"),
    ],
)  # fmt: skip
async def test_what_is_no_known_key_is_refused(profile: Path, keys: Path, headers: dict[str, str]) -> None:
    async with serving_app(config_of(profile, api_key_file=keys)) as client:
        response = await client.post("/predict", data=PIXELS, headers=headers)
        assert (response.status, (await response.json())["reason"]) == (401, "unauthorized")
        assert (await client.get(f"/profile?key={FIRST}", headers=headers)).status == 401
        with pytest.raises(WSServerHandshakeError, match="401"):
            await client.ws_connect("/stream", headers=headers)
        assert (await client.post("/predict", data=PIXELS, headers=bearer(FIRST))).status == 200


async def test_metrics_are_open_where_that_is_asked_for(profile: Path, keys: Path) -> None:
    async with serving_app(config_of(profile, api_key_file=keys, open_metrics=True)) as client:
        assert (await client.get("/metrics")).status == 200
        assert (await client.get("/profile")).status == 401


async def test_keys_guard_an_application_that_is_mounted_in_another(profile: Path, keys: Path) -> None:
    outer, app = web.Application(), make_app(config_of(profile, api_key_file=keys))
    outer.add_subapp("/vision", app)
    async with TestClient(TestServer(outer)) as client:
        await app[SERVE].start_soon()
        assert (await client.get("/vision/healthz")).status == 200
        assert (await client.post("/vision/predict", data=PIXELS)).status == 401
        assert (await client.post("/vision/predict", data=PIXELS, headers=bearer(FIRST))).status == 200


@pytest.mark.parametrize("path", ["/healthz/", "//profile", "/healthz/../profile", "/%68ealthz/..%2fprofile"])
async def test_no_spelling_of_an_open_path_opens_another(profile: Path, keys: Path, path: str) -> None:
    async with serving_app(config_of(profile, api_key_file=keys)) as client:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        assert answer.split()[1] in (b"401", b"404")
        assert b"entries" not in answer


async def test_a_request_without_a_key_costs_no_place_and_its_body_is_not_read(profile: Path, keys: Path) -> None:
    app = make_app(config_of(profile, api_key_file=keys))
    async with TestClient(TestServer(app)) as client:
        await app[SERVE].start_soon()
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"401"
        writer.close()
        assert app[SERVE].dispatcher is not None
        assert not app[SERVE].dispatcher.counters


async def test_keys_are_in_no_log_no_error_and_no_repr(
    profile: Path, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = config_of(profile, api_key_file=keys)
    async with listening_app(config) as url:
        for sent in (FIRST, FIRST + "\0", "wrong-key-wrong-key", FIRST * 1000):
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
            writer.write(f"GET /profile HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-API-Key: {sent}\r\n\r\n".encode())
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.")
            assert FIRST.encode() not in answer
            writer.close()
    logged = "\n".join(JsonLines().format(record) for record in caplog.records)
    assert FIRST not in logged + repr(load_keys(keys)) + repr(config)
    assert SECOND not in logged + repr(load_keys(keys)) + repr(config)


BAD_KEYS = {
    "": "no API key in it",
    "# only a comment\n\n": "no API key in it",
    "good-key-0123456789\nshort\n": "line 2 is no API key",
    "two words in one key\n": "line 1 is no API key",
    "schlüssel-schlüssel-1\n": "line 1 is no API key",
}


@pytest.mark.parametrize("text", BAD_KEYS)
def test_a_file_without_good_keys_is_refused_without_showing_any(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "keys", text)
    with pytest.raises(AccessError, match=BAD_KEYS[text]) as error:
        load_keys(path)
    assert str(error.value).startswith(f"{path}: ")
    assert not any(line and line in str(error.value) for line in text.splitlines())


def test_a_file_of_keys_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="none: the API keys cannot be read: No such file"):
        load_keys(tmp_path / "none")
    with pytest.raises(AccessError, match="cannot be read: Is a directory"):
        load_keys(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(AccessError, match="no text of API keys"):
        load_keys(tmp_path / "binary")
    (tmp_path / "large").write_bytes(bytes(2**20 + 1))
    with pytest.raises(AccessError, match="are no file of API keys"):
        load_keys(tmp_path / "large")


async def test_openapi_tells_what_wants_a_key(profile: Path, keys: Path) -> None:
    async with serving_app(config_of(profile, api_key_file=keys, open_metrics=True)) as client:
        described = await (await client.get("/openapi.json", headers=bearer(FIRST))).json()
        assert described["security"] == [{"bearer": []}, {"header": []}]
        for path, item in described["paths"].items():
            for method, operation in item.items():
                sent = path.replace("{model}", "tiny").replace("{version}", "1").replace("{name}", "app.js")
                wants = (await client.request(method, sent)).status == 401
                assert wants == ("401" in operation["responses"]) == ("security" not in operation), path


# -------------------------------------------------------------------------------------------------------------- origins


@pytest.mark.parametrize(
    ("origin", "allowed", "status"),
    [
        (None, "", 101), ("http://HOST", "", 101), ("https://HOST", "", 101), ("http://evil.example", "", 403),
        ("null", "", 403), ("http://HOST.evil.example", "", 403), ("", "", 403), ("file://", "", 403),
        ("https://shop.example", "https://shop.example", 101),
        ("https://shop.example", "http://a.b, HTTPS://shop.example", 101),
        ("https://evil.example", "https://shop.example", 403), ("http://shop.example", "https://shop.example", 403),
        ("https://any.example", "*", 101), ("http://HOST", "https://shop.example", 101),
    ],
)  # fmt: skip
async def test_a_page_opens_a_stream_only_from_this_host_or_an_allowed_origin(
    profile: Path, origin: str | None, allowed: str, status: int
) -> None:
    async with serving_app(config_of(profile, allow_origin=allowed)) as client:
        host = f"{client.host}:{client.port}"
        headers = {} if origin is None else {"Origin": origin.replace("HOST", host)}
        if status == 101:
            await (await client.ws_connect("/stream", headers=headers)).close()
        else:
            with pytest.raises(WSServerHandshakeError, match=str(status)):
                await client.ws_connect("/stream", headers=headers)


async def test_no_answer_may_be_read_by_other_pages_unless_allowed(profile: Path) -> None:
    page = {"Origin": "https://shop.example"}
    preflight = {**page, "Access-Control-Request-Method": "POST"}
    async with serving_app(config_of(profile)) as client:
        for response in (
            await client.post("/predict", data=PIXELS, headers=page),
            await client.get("/profile", headers=page),
            await client.options("/predict", headers=preflight),
        ):
            assert not [name for name in response.headers if name.lower().startswith("access-control")]
        assert response.status == 405


async def test_pages_of_an_allowed_origin_may_ask_and_read_also_errors(profile: Path, keys: Path) -> None:
    config = config_of(profile, allow_origin="https://shop.example", api_key_file=keys)
    page, other = {"Origin": "https://shop.example"}, {"Origin": "https://evil.example"}
    async with serving_app(config) as client:
        preflight = await client.options("/predict", headers={**page, "Access-Control-Request-Method": "POST"})
        assert preflight.status == 204
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://shop.example"
        assert "X-API-Key" in preflight.headers["Access-Control-Allow-Headers"]
        for headers, status in ((page, 401), ({**page, **bearer(FIRST)}, 200)):
            response = await client.post("/predict", data=PIXELS, headers=headers)
            assert (response.status, response.headers["Vary"]) == (status, "Origin")
            assert response.headers["Access-Control-Allow-Origin"] == "https://shop.example"
            assert "Access-Control-Allow-Credentials" not in response.headers
        refused = await client.options("/predict", headers={**other, "Access-Control-Request-Method": "POST"})
        assert (refused.status, refused.headers.get("Access-Control-Allow-Origin")) == (401, None)


@pytest.mark.parametrize("text", ["a.example", "https://a.example/", "ftp://x", "https://a b", "https://x:y", "null"])
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"allow_origin must be origins such as .* not "):
        Config(allow_origin=text)


async def test_the_page_has_its_security_headers(profile: Path) -> None:
    async with serving_app(config_of(profile)) as client:
        for path in ("/", "/static/app.js"):
            headers = (await client.get(path)).headers
            assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
            assert headers["Referrer-Policy"] == "no-referrer"


# ------------------------------------------------------------------------------------------------------------------ TLS


async def test_https_and_wss_are_spoken_with_a_certificate(profile: Path, certificate: Path) -> None:
    config = config_of(profile, tls_cert=certificate / "cert.pem", tls_key=certificate / "key.pem")
    trusting = ssl.create_default_context(cafile=certificate / "cert.pem")
    async with listening_app(config) as url, aiohttp.ClientSession(url) as session:
        assert url.startswith("https://127.0.0.1:")
        async with session.post("/predict", data=PIXELS, ssl=trusting) as response:
            assert response.status == 200
        async with session.ws_connect("/stream", ssl=trusting) as socket:
            await socket.send_bytes(b"\x09\0\0\0" + b'{"id": 1}' + PIXELS)
            assert (await socket.receive_json())["id"] == 1
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get("/healthz")


async def test_plain_http_and_old_tls_get_nothing_from_an_https_server(profile: Path, certificate: Path) -> None:
    config = config_of(profile, tls_cert=certificate / "cert.pem", tls_key=certificate / "key.pem")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    trusting = ssl.create_default_context(cafile=certificate / "cert.pem")
    async with listening_app(config) as url, aiohttp.ClientSession(url) as session:
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(url.replace("https", "http") + "/healthz")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get("/healthz", ssl=old)
        assert (await session.get("/healthz", ssl=trusting)).status == 200


def test_a_certificate_that_cannot_be_used_is_named(certificate: Path, tmp_path: Path) -> None:
    cert, key = certificate / "cert.pem", certificate / "key.pem"
    nonsense = written(tmp_path / "nonsense.pem", "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    locked = written(tmp_path / "locked.pem", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n")
    for files, message in {
        (tmp_path / "none", key): "none: the certificate cannot be read: No such file",
        (cert, tmp_path / "none"): "none: the private key cannot be read: No such file",
        (key, key): "key.pem: no certificate in PEM form",
        (cert, cert): "cert.pem: no private key in PEM form",
        (cert, certificate / "other.pem"): r"other.pem: not the private key of the certificate in .*cert.pem",
        (nonsense, key): "nonsense.pem and .*key.pem cannot be used",
        (cert, locked): "locked.pem: the private key is encrypted",
    }.items():
        with pytest.raises(AccessError, match=message):
            load_tls(*files)


@pytest.mark.parametrize(("given", "missing"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_a_certificate_needs_its_key_and_the_other_way_round(given: str, missing: str) -> None:
    settings: dict[str, Any] = {given: Path("x.pem")}
    with pytest.raises(ConfigError, match=f"{missing} must be given as well where {given} is"):
        Config(**settings)


# ------------------------------------------------------------------------------------------------- told at the start


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.com", False), ("", False)],
)  # fmt: skip
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def limits_of(config: Config) -> ConnectionLimits:
    return replace(startup.connection_limits(config), connections=config.max_connections)


def test_what_lets_more_in_than_one_might_think_is_told(keys: Path, tmp_path: Path) -> None:
    def told(**settings: Any) -> list[str]:
        config = Config(**settings)
        return startup.exposures(config, limits_of(config))

    shown = written(tmp_path / "shown", FIRST, 0o644)
    assert told() == told(api_key_file=keys, host="0.0.0.0") == []
    assert told(host="0.0.0.0") == ["whoever reaches 0.0.0.0 may use this server: there is no api_key_file"]
    assert told(api_key_file=shown) == [f"api_key_file {shown} can be read by all users of this machine"]


def test_fewer_connections_than_asked_for_are_told() -> None:
    config = Config(max_connections=1000)
    assert startup.exposures(config, replace(limits_of(config), connections=7)) == [
        "max_connections is 1000, but the limit of open files leaves room for 7"
    ]


def test_check_finds_what_is_wrong_with_keys_and_certificates(profile: Path, tmp_path: Path, certificate: Path) -> None:
    empty = written(tmp_path / "keys", "")
    (error, *_) = check(config_of(profile, api_key_file=empty))
    assert error == Finding("error", f"{empty}: no API key in it; put one into each line")
    pair = {"tls_cert": certificate / "cert.pem", "tls_key": certificate / "other.pem"}
    (error, *_) = check(config_of(profile, **pair))
    assert (error.level, "not the private key" in error.text) == ("error", True)
    (warning, fits) = check(config_of(profile, host="0.0.0.0"))
    assert (warning.level, fits.level) == ("warning", "ok")


@pytest.mark.slow
def test_the_command_warns_when_strangers_can_reach_it_and_ends_when_its_keys_are_missing(profile: Path) -> None:
    command = [sys.executable, "superserve.py", "--profile", str(profile), "--port", "0", "--device", "cpu"]
    command += ["--threads", "1", "--host", "0.0.0.0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as popen:
        assert popen.stderr is not None
        first = json.loads(popen.stderr.readline())
        popen.kill()
    assert (first["event"], first["level"]) == ("exposed", "warning")
    assert "whoever reaches 0.0.0.0" in first["why"]
    ended = subprocess.run([*command, "--api-key-file", "/none"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "superserve: /none: the API keys cannot be read: No such file or directory\n"
