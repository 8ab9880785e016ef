"""The Open Inference Protocol v2 over HTTP, under /v2: what tritonclient, perf_analyzer and KServe's clients speak.

One model with one version and one output; infer_requests.py and infer_texts.py say what the inputs are. The metadata
show images as pixels: they need no knowledge of how the network was trained, and any bytes, as load tools send them,
are some. A request with several rows is several queries that share a deadline; they are answered together and in order,
and if one of them fails, the request fails as it did. docs/api.md shows it in use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from aiohttp import web
from numpy.typing import NDArray

from web.bodies import read_body
from web.errors import BadRequest, DeadlineExceeded, NotReady, NotSupported, TooLarge, UnknownModel, json_response
from web.infer_answers import accepted_encoding, compress, encode_answer, is_quick
from web.infer_reading import Reading
from web.infer_requests import (
    INPUT,
    MOST_ROWS,
    OUTPUT,
    PRIORITIES,
    InferRequest,
    ModelForm,
    read_infer_request,
)
from web.infer_texts import describe_forms, is_optional, tensors_of
from web.inputs import INLINE_BODY_BYTES, ImageForm, Parameters, parse_parameters
from web.json_values import parse_json
from web.serving import Reply, Serving
from web.state import version
from web.tensors import TensorForm
from web.texts import TextForm

VERSION = "1"
PLATFORM = "superserve_supernet"
EXTENSIONS = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "schedule_policy",
    "statistics",
)  # fmt: skip
HEADER_LENGTH = "Inference-Header-Content-Length"
# Smaller answers are sent as they are: compressing them saves no packet.
COMPRESSED_FROM_BYTES = 1024
ADMIN_BODY_S = 10.0


class OpenInference:
    """The handlers of /v2 for one server."""

    def __init__(self, serve: Serving) -> None:
        self._serve = serve
        settings = serve.config
        self._form = ModelForm(
            name=serve.name,
            version=VERSION,
            input=serve.form.shape if isinstance(serve.form, ImageForm) else serve.form,
            classes=len(serve.classes),
            most_rows=min(MOST_ROWS, settings.max_queue),
            max_pixels=settings.max_pixels,
            longest_slo_s=settings.max_slo_ms / 1e3,
        )

    def routes(self) -> list[web.RouteDef]:
        """All routes; what a model answers is found with and without a version."""
        found = [
            web.get("/v2", self.server_metadata),
            web.get("/v2/health/live", self.live),
            web.get("/v2/health/ready", self.ready),
            web.get("/v2/models/stats", self.statistics),
            web.post("/v2/repository/index", self.repository_index),
            web.post("/v2/repository/models/{model}/load", self.load),
            web.post("/v2/repository/models/{model}/unload", self.unload),
        ]
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            found += [
                web.get(model, self.model_metadata),
                web.get(f"{model}/ready", self.model_ready),
                web.get(f"{model}/config", self.model_config),
                web.get(f"{model}/stats", self.statistics),
                web.post(f"{model}/infer", self.infer),
            ]
        return found + self._unsupported_routes()

    def _unsupported_routes(self) -> list[web.RouteDef]:
        settings = ("/v2/logging", "/v2/trace/setting", "/v2/models/{model}/trace/setting")
        memory = ("/v2/systemsharedmemory/{call:.+}", "/v2/cudasharedmemory/{call:.+}")
        return [make(path, self.unsupported) for path in (*settings, *memory) for make in (web.get, web.post)]

    # ------------------------------------------------------------------------------------------------ health, metadata

    async def live(self, _: web.Request) -> web.Response:
        """GET /v2/health/live: the process is alive."""
        return json_response({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        """GET /v2/health/ready: queries are answered; else 503."""
        self._serve.limits()
        return json_response({"ready": True})

    async def model_ready(self, request: web.Request) -> web.Response:
        """GET …/ready: as for the server, which has one model."""
        self._check_model(request)
        self._serve.limits()
        return json_response({"name": self._serve.name, "ready": True})

    async def server_metadata(self, _: web.Request) -> web.Response:
        """GET /v2: name, version and extensions of the protocol."""
        return json_response({"name": "superserve", "version": version(), "extensions": EXTENSIONS})

    async def model_metadata(self, request: web.Request) -> web.Response:
        """GET /v2/models/NAME: datatypes and shapes, rows included."""
        self._check_model(request)
        return json_response(
            {
                "name": self._serve.name,
                "versions": [VERSION],
                "platform": PLATFORM,
                "inputs": [
                    {"name": each.name, "datatype": each.datatype, "shape": each.shape} for each in self._tensors
                ],
                "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(self._serve.classes)]}],
            }
        )

    async def model_config(self, request: web.Request) -> web.Response:
        """GET …/config: what bounds a request; shapes without rows, as the protocol wants them here."""
        self._check_model(request)
        settings = self._serve.config
        queue = {
            "timeout_action": "REJECT",
            "default_timeout_microseconds": round(settings.default_slo_ms * 1e3),
            "allow_timeout_override": True,
            "max_queue_size": settings.max_queue,
        }
        return json_response(
            {
                "name": self._serve.name,
                "platform": PLATFORM,
                "version_policy": {"latest": {"num_versions": 1}},
                "max_batch_size": self._form.most_rows,
                "input": [self._input_config(each) for each in self._tensors],
                "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [len(self._serve.classes)]}],
                "dynamic_batching": {
                    "priority_levels": PRIORITIES,
                    "default_priority_level": PRIORITIES,
                    "default_queue_policy": queue,
                },
                "model_transaction_policy": {"decoupled": False},
                "parameters": {"input_forms": {"string_value": self._input_forms()}},
            }
        )

    @property
    def _tensors(self) -> list[TensorForm]:
        """The inputs as the metadata show them."""
        form = self._form.input
        if isinstance(form, TextForm):
            return tensors_of(form)
        return [TensorForm(INPUT, "UINT8", (-1, form.height, form.width, form.channels))]

    def _input_config(self, tensor: TensorForm) -> dict[str, object]:
        form = self._form.input
        return {
            "name": tensor.name,
            "data_type": "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}",
            "dims": tensor.shape[1:],
            "optional": isinstance(form, TextForm) and is_optional(form, tensor.name),
        }

    def _input_forms(self) -> str:
        form = self._form.input
        if isinstance(form, TextForm):
            return describe_forms(form)
        pixels, planes = [-1, form.height, form.width, form.channels], [-1, form.channels, form.height, form.width]
        return f"UINT8 {pixels} pixels; FP32, FP16 or BF16 {planes} normalised; BYTES [-1] encoded images"

    async def statistics(self, request: web.Request) -> web.Response:
        """GET …/stats: counts and times since the start."""
        if "model" in request.match_info:
            self._check_model(request)
        return json_response({"model_stats": [self._serve.statistics.document(self._serve.name, VERSION)]})

    def _check_model(self, request: web.Request) -> None:
        name, number = request.match_info["model"], request.match_info.get("version", VERSION)
        if name != self._serve.name:
            raise UnknownModel(f"unknown model '{name:.80}'; known: {self._serve.name}")
        if number != VERSION:
            raise UnknownModel(f"unknown version '{number:.40}' of '{name}'; known: {VERSION}")

    # ------------------------------------------------------------------------------------------- repository, the rest

    async def repository_index(self, request: web.Request) -> web.Response:
        """POST /v2/repository/index: the one model; left out if it is not ready and only those are asked for."""
        wanted = await self._read_object(request, "ready")
        if not isinstance(wanted.get("ready", False), bool):
            raise BadRequest("ready must be true or false")
        state, reason = "READY", ""
        try:
            self._serve.limits()
        except NotReady as error:
            state, reason = "UNAVAILABLE", str(error)
        shown = state == "READY" or not wanted.get("ready", False)
        entry = {"name": self._serve.name, "version": VERSION, "state": state, "reason": reason}
        return json_response([entry] if shown else [])

    async def load(self, request: web.Request) -> web.Response:
        """POST …/load: the model is loaded already; with another configuration or files, it cannot be."""
        self._check_model(request)
        if (await self._read_object(request, "parameters")).get("parameters"):
            raise NotSupported("models are not loaded with other configurations or files; start another server")
        self._serve.limits()
        return json_response({})

    async def unload(self, request: web.Request) -> web.Response:
        """POST …/unload: refused."""
        self._check_model(request)
        raise NotSupported("this server serves one model and keeps it; stop the server instead")

    async def unsupported(self, request: web.Request) -> web.Response:
        """Shared memory, trace and log settings: refused."""
        raise NotSupported(f"{request.path} is not supported here: no shared memory, no trace or log settings")

    async def _read_object(self, request: web.Request, known: str) -> dict[str, Any]:
        """A small JSON body with at most the one known member; an empty body is an empty object."""
        body = await read_body(request, ADMIN_BODY_S, self._serve.config.max_body_bytes)
        document = parse_json(body or b"{}", 0, "the body")
        if not isinstance(document, dict) or not document.keys() <= {known}:
            raise BadRequest(f"the body must be an object with no member but '{known}'")
        return document

    # ----------------------------------------------------------------------------------------------------------- infer

    async def infer(self, request: web.Request) -> web.Response:
        """POST …/infer: one query per row, one answer for all of them."""
        arrival_s = self._serve.clock()
        self._check_model(request)
        asked = await self._read(request, arrival_s)
        parameters = self._parameters(request, asked.texts)
        replies = await self._answers(asked.rows, arrival_s, parameters)
        return await self._answer(asked, replies, accepted_encoding(request.headers.get("Accept-Encoding", "")))

    async def _read(self, request: web.Request, arrival_s: float) -> InferRequest:
        # The SLO may stand in the body; one that stands before it bounds the upload.
        in_head = self._parameters(request, {})
        given = any(name in request.query or name in request.headers for name in _SLO_NAMES)
        within_s = in_head.slo_s if given else self._form.longest_slo_s
        self._serve.turn_away(arrival_s, replace(in_head, slo_s=within_s))
        body = await read_body(request, within_s, self._serve.config.max_body_bytes)
        header_length = request.headers.get(HEADER_LENGTH)
        reading = Reading(clock=self._serve.clock, arrival_s=arrival_s, slo_s=in_head.slo_s, inline=True)
        if len(body) <= INLINE_BODY_BYTES:
            try:
                return read_infer_request(body, header_length, self._form, reading)
            except TooLarge:
                pass  # a small file can hold a large image, which is then looked at again
        self._serve.limits()  # a server that drains has other things to do
        thoroughly = replace(reading, inline=False)
        try:
            return await self._serve.aside(partial(read_infer_request, body, header_length, self._form, thoroughly))
        except DeadlineExceeded as error:
            slo_ms = error.details["slo_ms"]
            assert isinstance(slo_ms, float), "as read_infer_request tells it"
            self._serve.turn_away(arrival_s, replace(in_head, slo_s=slo_ms / 1e3))  # raises, and counts it
            raise

    def _parameters(self, request: web.Request, texts: Mapping[str, str]) -> Parameters:
        """Parameters by all ways that /predict knows; those of the body win."""
        if "top_k" in request.query:
            raise BadRequest(f"top_k is a parameter of /predict; here, ask for the classification of '{OUTPUT}'")
        return parse_parameters({**request.query, **texts}, request.headers, self._serve.limits())

    async def _answers(
        self, rows: Sequence[NDArray[Any]], arrival_s: float, parameters: Parameters
    ) -> Sequence[Reply]:
        """The replies to all rows, in order; the first error ends them all."""
        if len(rows) == 1:
            return [await self._serve.submit(rows[0], arrival_s, parameters)]
        queries = [asyncio.ensure_future(self._serve.submit(row, arrival_s, parameters)) for row in rows]
        try:
            return await asyncio.gather(*queries)
        finally:
            while queries:  # the frame is not to refer to them any more: they keep their errors, which refer to it
                queries.pop().cancel()

    async def _answer(self, asked: InferRequest, replies: Sequence[Reply], encoding: str) -> web.Response:
        encode = partial(encode_answer, asked, replies, self._form, self._serve.classes)
        quick = is_quick(asked, len(replies), len(self._serve.classes))
        answer = encode() if quick else await self._serve.aside(encode)
        headers = {"Vary": "Accept-Encoding"}
        if answer.header_bytes is not None:
            headers[HEADER_LENGTH] = str(answer.header_bytes)
        body = answer.body
        if encoding != "identity" and len(body) >= COMPRESSED_FROM_BYTES:
            headers["Content-Encoding"] = encoding
            pack = partial(compress, body, encoding)
            body = pack() if len(body) <= INLINE_BODY_BYTES else await self._serve.aside(pack)
        content_type = "application/json" if answer.header_bytes is None else "application/octet-stream"
        return web.Response(body=body, headers=headers, content_type=content_type)


_SLO_NAMES = ("slo_ms", "X-SLO-Ms", "X-Envoy-Expected-Rq-Timeout-Ms")
