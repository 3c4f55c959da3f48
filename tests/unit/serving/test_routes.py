"""Routes beside chat: models, health, counters, the schema, and the errors of all of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from pipelines.serving import api as api_module
from pipelines.serving.api import ERRORS, HeadAsGet, build_api
from pipelines.serving.backend import ModelInfo, ReplicaStats
from pipelines.serving.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, Metrics
from pipelines.settings import ServeSettings
from tests.serving_api import CHAT, Client, FakeBackend, TimedClient, ask, words
from tinygptv import __version__


def error_of(response):
    return {"status": response.status_code, **response.json()["error"]}


def test_the_served_model_and_what_it_can_do():
    model = {
        "id": "name",
        "object": "model",
        "created": 100,
        "owned_by": "tinygptv",
        "context_length": 512,
        "max_model_len": 512,
        "scope": "s",
    }

    class Backend(FakeBackend):
        asked = 0

        async def describe(self):
            self.asked += 1
            return ModelInfo(16, 512, 100, "s")

    client = Client(Backend(), model_name="name")
    assert client.request("GET", "/v1/models").json() == {"object": "list", "data": [model]}
    assert client.request("GET", "/v1/models/name").json() == model
    assert client.backend.asked == 1, "it is known by then"
    refused = error_of(client.request("GET", "/v1/models/names"))
    assert (refused["status"], refused["param"], refused["code"]) == (404, "model", "model_not_found")
    assert refused["message"] == "the model 'names' does not exist; this server has 'name'."
    assert client.backend.asked == 1
    for other in ("nme", "n", "Name", "x/name"):
        assert client.request("GET", f"/v1/models/{other}").status_code == 404
        assert client.chat({**ask(words("hi")), "model": other}).status_code == 404


class Slow(FakeBackend):
    """A model whose health and counters never come."""

    async def check_health(self):
        await asyncio.sleep(60)

    stats = check_health


@pytest.fixture
def limits(monkeypatch):
    """The time limits of routes, in seconds."""
    limits = []

    def timeout(seconds):
        limits.append(seconds)
        return asyncio.timeout(seconds)

    others = {name: getattr(asyncio, name) for name in ("to_thread",)}
    monkeypatch.setattr(api_module, "asyncio", SimpleNamespace(timeout=timeout, **others))
    return limits


@pytest.mark.parametrize("slow", [True, False])
def test_a_model_that_cannot_answer_is_not_ready(limits, caplog, slow):
    client = TimedClient(Slow() if slow else FakeBackend())
    client.backend.healthy = False
    response = client.request("GET", "/healthz")
    assert error_of(response) == {
        "status": 503,
        "message": "the model cannot answer.",
        "type": "server_error",
        "param": None,
        "code": "not_ready",
    }
    assert response.headers["retry-after"] == "5" and limits == [5]
    assert [r.exc_info is not None for r in caplog.records if r.getMessage() == "the model cannot answer"] == [True]
    good = TimedClient().request("GET", "/healthz")
    assert (good.status_code, good.json()) == (200, {"status": "ok"})
    assert client.metrics.registry.get_sample_value("tinygptv_requests_total", {"status": "503"}) is None


def page(backend, all_metrics=None):
    metrics = Metrics()
    metrics.requests.labels(200).inc(3)
    client = TimedClient(backend)
    client.app = build_api(ServeSettings(), backend, metrics, all_metrics=all_metrics)
    response = client.request("GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return response.text


def test_counters_are_shown_of_whoever_answers_in_time(limits, caplog):
    text = page(Slow())
    assert 'tinygptv_requests_total{status="200"} 3.0' in text and "engine_steps_total{" not in text
    assert limits == [3] and caplog.messages == ["no counters from the model"]
    assert caplog.records[0].exc_info[0] is TimeoutError, "with its trace"

    async def fails():
        raise RuntimeError("gone")

    caplog.clear()
    assert 'tinygptv_requests_total{status="200"} 3.0' in page(FakeBackend(), fails)
    assert limits[1:] == [3, 3] and "no counters from other ingresses" in caplog.messages


def test_counters_of_all_ingresses_and_replicas_are_on_one_page():
    class Counted(FakeBackend):
        async def stats(self):
            return [ReplicaStats("7", "node", dict.fromkeys((*ENGINE_COUNTERS, *ENGINE_GAUGES), 2.0))]

    async def others():
        first, second = Metrics(), Metrics()
        first.requests.labels(200).inc(4)
        second.requests.labels(200).inc(5)
        return [first.snapshot("a"), second.snapshot("b")]

    text = page(Counted(), others)
    assert 'tinygptv_requests_total{ingress="a",status="200"} 4.0' in text
    assert 'tinygptv_requests_total{ingress="b",status="200"} 5.0' in text and " 3.0" not in text
    assert 'tinygptv_engine_steps_total{replica="7"} 2.0' in text


def test_the_schema_names_the_served_model_and_each_refusal():
    client = Client(model_name="name")
    for _ in range(2):
        schema = client.request("GET", "/openapi.json").json()
    assert (schema["info"]["title"], schema["info"]["version"]) == ("TinyGPT-V", __version__)
    request = schema["components"]["schemas"]["ChatRequest"]
    assert request["properties"]["model"]["enum"] == ["name"] and "$defs" not in request
    chat = schema["paths"][CHAT]["post"]
    assert chat["requestBody"]["required"] is True
    told = {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert set(chat["responses"]) == told == {"200", *map(str, ERRORS)}
    ok = chat["responses"]["200"]["content"]["application/json"]["schema"]
    assert ok["$ref"].endswith("/ChatCompletion")
    assert chat["responses"]["200"]["content"]["text/event-stream"]["schema"] == {"type": "string"}
    body = chat["responses"]["429"]
    words = {
        "400": "is wrong", "401": "API key", "404": "no such model", "408": "too slowly", "413": "too large",
        "415": "compressed", "429": "too many requests; see Retry-After", "500": "failed",
        "503": "not available", "504": "too long",
    }  # fmt: skip
    for status, text in words.items():
        assert text in chat["responses"][status]["description"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    other = schema["components"]["schemas"]["ResponsesRequest"]["properties"]
    assert other["model"]["enum"] == ["name"] and {"input", "task", "temperature"} <= set(other)
    assert not {"messages", "max_tokens", "response_format"} & set(other)
    responses = schema["paths"]["/v1/responses"]["post"]
    assert responses["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ResponsesRequest")
    assert set(responses["responses"]) == told
    assert set(schema["paths"]) == {
        CHAT,
        "/v1/responses",
        "/v1/models",
        "/v1/models/{model_id}",
        "/healthz",
        "/metrics",
    }
    assert set(schema["paths"]["/v1/models/{model_id}"]["get"]["responses"]) >= {"401", "404", "503"}
    assert set(schema["paths"]["/healthz"]["get"]["responses"]) == {"200", "503"}


def test_an_error_that_nobody_foresaw_is_logged_and_not_shown(caplog):
    class Broken(FakeBackend):
        async def describe(self):
            raise RuntimeError("/root/secret")

    client = Client(Broken())
    wanted = {"status": 500, "message": "the server failed to answer; its log says why.", "type": "server_error"}
    for response in (client.request("GET", "/v1/models"), client.chat(ask(words("hi")))):
        assert error_of(response) == {**wanted, "param": None, "code": None}
    assert caplog.text.count("/root/secret") >= 2 and "request failed" in caplog.messages
    assert client.metrics.registry.get_sample_value("tinygptv_requests_total", {"status": "500"}) == 1


def test_unknown_paths_and_methods_are_told_as_they_were_asked():
    client = Client()
    wanted = {"type": "invalid_request_error", "param": None, "code": None}
    has = (
        " This server has POST /v1/chat/completions, POST /v1/responses, GET /v1/models, GET /v1/models/{model_id},"
        " GET /healthz, GET /metrics."
    )
    for method, path in (
        ("GET", "/v2/x?y=1"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/chat/completions"),
        ("GET", "/v1"),
    ):
        asked = f"{method} {path.partition('?')[0]}"
        found = error_of(client.request(method, path, json={}))
        assert found == {"status": 404, "message": f"{asked}: Not Found.{has}", **wanted}
    response = client.request("DELETE", "/v1/models")
    assert error_of(response) == {"status": 405, "message": f"DELETE /v1/models: Method Not Allowed.{has}", **wanted}
    assert response.headers["allow"] == "GET"


def test_two_models_of_one_cluster_have_a_prefix_each():
    """Everything that looks at the path looks at what is below the prefix."""
    client = Client(api_keys=["key"], open_paths=["/metrics"])
    client.prefix = "/one"
    key = {"Authorization": "Bearer key"}
    for path in ("/v1/models", "/v1//models", "/v1/models/"):
        assert client.request("GET", f"/one{path}", headers=key).json()["object"] == "list"
    assert client.request("POST", f"/one{CHAT}/", headers=key, json=ask(words("hi"))).status_code == 200
    assert client.request("POST", f"/one{CHAT}", headers=key, json={}).status_code == 400
    assert client.metrics.registry.get_sample_value("tinygptv_requests_total", {"status": "400"}) == 1
    assert client.request("GET", "/one/metrics").status_code == 200
    assert client.request("GET", "/one/v1/models").headers["www-authenticate"] == "Bearer", "no dialog of a browser"


@pytest.mark.parametrize("prefix", ["/v1", "//v1", "/v1/"])
def test_a_slash_too_many_in_a_base_url_is_none(prefix):
    client = Client(model_name="org/name", api_keys=["key"])
    headers = {"Authorization": "Bearer key"}
    body = {**ask(words("hi")), "model": "org/name"}
    for end in ("", "/"):
        path = f"http://server{prefix}/chat/completions{end}"
        assert client.request("POST", path, json=body, headers=headers).status_code == 200
        assert client.request("POST", path, json=body).status_code == 401
        for name in ("", "/org/name"):
            answer = client.request("GET", f"http://server{prefix}/models{name}{end}", headers=headers)
            assert answer.status_code == 200 and (answer.json().get("id") or "org/name") == "org/name"
    assert client.metrics.registry.get_sample_value("tinygptv_requests_total", {"status": "401"}) == 2


@pytest.mark.security
def test_scenes_are_of_models_that_know_them_and_behind_the_key(monkeypatch):
    monkeypatch.setattr(api_module, "draw_scene", lambda: {
        "image": "data:", "task": "refer", "question": "q", "answer": "", "box": (1, 2, 3, 4)
    })  # fmt: skip
    drawn = Client().request("GET", "/ui/scene")
    assert drawn.json() == {"image": "data:", "task": "refer", "question": "q", "answer": "", "box": [1, 2, 3, 4]}

    class Photographs(FakeBackend):
        async def describe(self):
            return ModelInfo(16, 100, 1, "photographs")

    response = Client(Photographs()).request("GET", "/ui/scene")
    refused = error_of(response)
    assert (refused["status"], refused["message"]) == (404, "the served model does not know drawn scenes.")
    assert "www-authenticate" not in response.headers, "no key would help"
    keyed = Client(api_keys=["key"])
    for path in ("/ui/scene", "/v1/models", "/v1/models/tinygpt-v"):
        assert keyed.request("GET", path).status_code == 401
        assert keyed.request("GET", path, headers={"Authorization": "Bearer key"}).status_code == 200


@pytest.mark.security
def test_other_sites_may_ask_and_read_as_far_as_they_are_allowed():
    client = Client(cors_origins=["https://a.example"])
    for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-any"}
        response = client.request("OPTIONS", CHAT, headers=asked)
        assert (response.status_code == 200) is allowed
        assert (response.headers.get("access-control-allow-origin") == origin) is allowed
    assert (
        "x-any"
        in client.request("OPTIONS", CHAT, headers={**asked, "Origin": "https://a.example"}).headers[
            "access-control-allow-headers"
        ]
    )
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "DELETE"}
    assert client.request("OPTIONS", CHAT, headers=asked).status_code == 400


def test_head_changes_only_requests_of_that_method():
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append((scope["type"], scope.get("method"), receive))
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def send(message):
        sent.append(message)

    def ask_with(scope):
        asyncio.run(HeadAsGet(app)(scope, "receive", send))
        return seen.pop(), sent[-1]

    whole = {"type": "http.response.body", "body": b"x", "more_body": True}
    assert ask_with({"type": "http", "method": "HEAD"}) == (("http", "GET", "receive"), {**whole, "body": b""})
    assert sent[0] == {"type": "http.response.start", "status": 200}
    assert ask_with({"type": "http", "method": "POST"}) == (("http", "POST", "receive"), whole)
    assert ask_with({"type": "lifespan"}) == (("lifespan", None, "receive"), whole)


@pytest.mark.parametrize("path", ["/healthz", "/", "/v1/models"])
def test_a_monitor_that_asks_with_head_gets_the_same_headers_and_no_body(path):
    client = Client()
    whole, head = client.request("GET", path), client.request("HEAD", path)
    assert (head.status_code, head.content) == (200, b"") and whole.content
    assert head.headers == whole.headers


def test_an_application_of_its_own_has_its_keys_and_counters():
    app = build_api(ServeSettings(api_keys=["own"]), FakeBackend())
    client = Client()
    client.app = app
    assert client.request("GET", "/v1/models").status_code == 401
    client.app = build_api(ServeSettings(api_keys=["own"]), FakeBackend(), digests=())
    assert client.request("GET", "/v1/models").status_code == 200, "digests stand in for the settings' keys"
