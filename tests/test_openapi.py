"""/openapi.json is true: every route is in it, and what the server does to generated requests is what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from serving import LARGE, SMALL, Served, config_of, image_array

from superserve import SERVE, SuperServe, make_app
from web.errors import BadRequest
from web.inputs import parse_parameters
from web.openapi import FIGURES, document

RAW = {"Content-Type": "application/octet-stream"}
PIXELS = image_array(0).tobytes()
# Refused whatever is sent, so that there is nothing to describe.
REFUSED = ("/v2/logging", "/v2/trace", "/v2/systemsharedmemory", "/v2/cudasharedmemory", "trace/setting")


def schema_of(described: dict[str, Any], path: str, status: str = "200", method: str = "get") -> dict[str, Any]:
    """The schema of an answer, with all others that it refers to."""
    answer = described["paths"][path][method]["responses"][status]["content"]["application/json"]["schema"]
    return answer | {"components": described["components"]}


async def test_every_route_is_described_and_every_path_served(profile: Path) -> None:
    app = make_app(config_of(profile))
    served = {
        f"{route.method.lower()} {route.resource.canonical}"
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = {f"{verb} {path}" for path, item in document(app[SERVE])["paths"].items() for verb in item}
    await app[SERVE].close()
    assert described - served == set()
    assert [route for route in served - described if not any(part in route for part in REFUSED)] == []


async def test_parameters_are_those_that_predict_knows(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as serve:
        (post,) = document(serve)["paths"]["/predict"].values()
        queries = {each["name"]: each["schema"] for each in post["parameters"] if each["in"] == "query"}
        with pytest.raises(BadRequest) as caught:
            parse_parameters({"x": "1"}, {}, serve.limits())
        assert sorted(queries) == str(caught.value).partition("known: ")[2].split(", ")
        assert queries.pop("members")["enum"] == [SMALL, LARGE]
        for name in (SMALL, LARGE):
            assert parse_parameters({"members": name}, {}, serve.limits()).choice == name
        for name, schema in queries.items():
            parse_parameters({name: str(schema["maximum"])}, {}, serve.limits())
            with pytest.raises(BadRequest, match=name):
                parse_parameters({name: str(schema["maximum"] + 1)}, {}, serve.limits())
        for each in post["parameters"]:
            if each["in"] == "header":
                with pytest.raises(BadRequest, match=r"must be a number|are no choice"):
                    parse_parameters({}, {each["name"]: "x"}, serve.limits())


async def test_the_document_is_served_before_the_server_is_ready(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    limit = document(serve)["paths"]["/predict"]["post"]["parameters"][1]["schema"]["maximum"]
    await serve.close()
    assert limit == 1


async def test_answers_have_the_form_that_is_described(client: TestClient[web.Request, web.Application]) -> None:
    described = await (await client.get("/openapi.json")).json()
    reply = await (await client.post("/predict?top_k=2", data=PIXELS, headers=RAW)).json()
    jsonschema_rs.validate(schema_of(described, "/predict", method="post"), reply)
    error = await (await client.post("/predict", data=b"no", headers=RAW)).json()
    jsonschema_rs.validate(schema_of(described, "/predict", "400", method="post"), error)
    for path in ("/profile", "/live", "/healthz", "/readyz"):
        jsonschema_rs.validate(schema_of(described, path), await (await client.get(path)).json())
    for path in ("/v2", "/v2/models/tiny", "/v2/models/tiny/config", "/v2/models/stats", "/v2/models/tiny/ready"):
        described_path = path.replace("tiny", "{model}")
        jsonschema_rs.validate(schema_of(described, described_path), await (await client.get(path)).json())


async def test_the_figures_of_the_live_page_are_those_described(
    client: TestClient[web.Request, web.Application],
) -> None:
    live = await (await client.get("/live")).json()
    assert set(FIGURES) | {"span_s"} == live["recent"].keys()
    script = await (await client.get("/static/app.js")).text()
    columns = re.search(r"^const COLUMNS = \[(.*)\];$", script, re.MULTILINE)
    assert columns is not None
    assert set(re.findall(r'"(\w+)"', columns[1])) <= set(FIGURES)


# --------------------------------------------------------------------------------------------------------- schemathesis


@pytest.mark.slow
def test_schemathesis_finds_nothing_that_the_document_does_not_say(profile: Path, tmp_path: Path) -> None:
    with Served(profile) as served:
        finished = schemathesis_of(served.url, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"\b(\d{3,}) generated, \1 passed", finished.stdout), finished.stdout


def schemathesis_of(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What it finds about the server at this URL."""
    tool = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool is not None, "requirements-dev.txt has it"
    here = Path(__file__).parent
    return subprocess.run(
        [tool, "--config-file", str(here / "schemathesis.toml"), "run", f"{url}/openapi.json", "--no-color"],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(here)},
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
