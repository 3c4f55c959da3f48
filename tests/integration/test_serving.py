"""The service as it runs: Ray Serve, real HTTP on loopback, OpenAI's client, faults."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from pipelines.settings import QuantizeSettings, ServeSettings, SettingsError
from tests.paths import ROOT
from tests.serving_model import data_url, make_image, make_model, make_processor, save_checkpoint
from tinygptv.checkpoint.checkpoint import save_checkpoint as save_verified

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

BODY = {
    "model": "tinygpt-v",
    "max_tokens": 12,
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is it?"},
                {"type": "image_url", "image_url": {"url": data_url(make_image())}},
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return ServeSettings(
        artifact=str(save_checkpoint(tmp_path_factory.mktemp("checkpoint"))),
        port=0,
        max_batch_size=2,
        max_queue=6,
        cpus_per_replica=0.5,
        stream_interval_ms=1,
    )


@pytest.fixture(scope="module")
def address(ray_cluster, settings):
    from ray import serve

    from pipelines.serving.run import deploy

    yield deploy(settings)
    serve.shutdown()


def post(address, body=None, **options):
    options.setdefault("timeout", 300)
    return httpx.post(f"{address}/v1/chat/completions", json=body or BODY, trust_env=False, **options)


def text_of(response):
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def engine_counter(address, name):
    page = httpx.get(f"{address}/metrics", timeout=120, trust_env=False).text
    values = [float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"tinygptv_engine_{name}")]
    return sum(values)


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def replica_pids(address):
    page = httpx.get(f"{address}/metrics", timeout=120, trust_env=False).text
    return {int(line.split('replica="')[1].split('"')[0]) for line in page.splitlines() if 'replica="' in line}


def test_openais_client_over_http(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(**BODY)
    stream = client.chat.completions.create(**BODY, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**BODY, temperature=9)


def test_openais_client_asks_the_responses_api_the_same(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    text, image = (part for part in BODY["messages"][0]["content"])
    content = [
        {"type": "input_text", "text": text["text"]},
        {"type": "input_image", "image_url": image["image_url"]["url"]},
    ]
    body = {"model": BODY["model"], "max_output_tokens": 12, "input": [{"role": "user", "content": content}]}
    whole = client.responses.create(**body)
    assert whole.output_text == text_of(post(address)) and whole.usage.output_tokens == 12
    *found, last = client.responses.create(**body, stream=True)
    pieces = [event.delta for event in found if event.type == "response.output_text.delta"]
    assert "".join(pieces) == last.response.output_text == whole.output_text and last.type == "response.incomplete"
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported"):
        client.responses.create(**body, previous_response_id=whole.id)


def test_a_stream_comes_in_pieces(address):
    body = {**BODY, "max_tokens": 200, "stream": True}

    def is_spread():
        arrivals = []
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=300, trust_env=False) as stream:
            for line in stream.iter_lines():
                arrivals += [time.perf_counter()] if line else []
        return len(arrivals) > 8 and arrivals[-1] - arrivals[0] > 0.02

    wait_for(is_spread)  # now and then a reader may find it all there


def test_page_health_and_metrics_are_there(address):
    assert httpx.get(f"{address}/healthz", timeout=120, trust_env=False).json() == {"status": "ok"}
    page = httpx.get(address, timeout=120, trust_env=False)
    assert page.status_code == 200 and "<html" in page.text
    assert engine_counter(address, "slots") == 2


def test_clients_at_once_get_their_own_answers(address):
    bodies = [{**BODY, "seed": i, "temperature": 1.0} for i in range(8)]
    alone = [text_of(post(address, body)) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = [text_of(response) for response in pool.map(lambda body: post(address, body), bodies)]
    assert together == alone and len(set(alone)) > 1


def test_overload_is_refused_in_openais_shape(address):
    responses, refused, deadline = [], [], time.monotonic() + 240

    def ask_until_refused(_):
        while not refused and time.monotonic() < deadline:
            responses.append(post(address, {**BODY, "max_tokens": 150}))
            if responses[-1].status_code == 429:
                refused.append(responses[-1])

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        list(pool.map(ask_until_refused, range(40)))
    assert refused and all(response.status_code in (200, 429) for response in responses)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded" and int(refused[0].headers["retry-after"]) >= 1
    assert text_of(post(address)) == text_of(post(address))


def test_a_client_that_goes_away_frees_its_slot(address):
    before = engine_counter(address, "cancelled_total")
    body = {**BODY, "max_tokens": 200, "stream": True}

    def leave():
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=300, trust_env=False) as stream:
            next(stream.iter_lines())

    wait_for(lambda: (leave(), engine_counter(address, "cancelled_total") > before)[1])  # not after its end
    with contextlib.suppress(httpx.TimeoutException):
        post(address, {**BODY, "max_tokens": 200}, timeout=0.015)
    wait_for(lambda: engine_counter(address, "running") == engine_counter(address, "waiting") == 0)


def test_a_killed_replica_ends_streams_cleanly_and_comes_back(address):
    wanted = text_of(post(address))
    (pid,) = replica_pids(address)
    body = {**BODY, "max_tokens": 220, "stream": True}
    lines = []
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=300, trust_env=False) as response:
        for line in response.iter_lines():
            lines += [line] if line else []
            if len(lines) == 2:  # the role, and the first words
                os.kill(pid, signal.SIGKILL)
    if lines[-1] != "data: [DONE]":  # where the answer was not faster than the signal
        assert "error" in json.loads(lines[-1][6:]), lines[-1]
    # No wait in between: what comes while there is no replica waits for the next one.
    assert text_of(post(address)) == wanted
    assert replica_pids(address) != {pid}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An MLflow registry whose champion is another model in low bits."""
    from mlflow import MlflowClient

    from pipelines.export import export

    monkeypatch.chdir(tmp_path)  # MLflow keeps its files in the working directory
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    checkpoint = save_verified(tmp_path / "checkpoint", make_model(seed=1), make_processor(), {"stage": "stage4"})
    options = {"drift_samples": 2, "max_drift": 50.0, "tracking_uri": uri, "register_as": "tinygptv"}
    result = export(QuantizeSettings(checkpoint=str(checkpoint), output=str(tmp_path / "artifact"), **options))
    assert result["version"] == 1
    tags = MlflowClient(tracking_uri=uri).get_model_version("tinygptv", "1").tags
    assert {"method", "bytes", "drift.loss", "drift.answer_agreement"} <= set(tags)
    return uri


def test_clients_that_leave_while_their_images_are_encoded_harm_nobody(address):
    """Sixteen leaving clients once ended all images: their cancelled futures ended the encoder thread."""
    host, port = address.removeprefix("http://").split(":")

    def leave(number):
        image = {"type": "image_url", "image_url": {"url": data_url(make_image(1000 + number))}}
        content = {**BODY, "messages": [{"role": "user", "content": [image]}]}
        body = json.dumps(content).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head + body)
            time.sleep(random.uniform(0.005, 0.1))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(48)))
    wait_for(lambda: engine_counter(address, "running") == engine_counter(address, "waiting") == 0)
    image = {"type": "image_url", "image_url": {"url": data_url(make_image(2000))}}
    assert text_of(post(address, {**BODY, "messages": [{"role": "user", "content": [image]}]}))
    assert httpx.get(f"{address}/healthz", timeout=120, trust_env=False).status_code == 200
    page = httpx.get(f"{address}/metrics", timeout=120, trust_env=False).text
    assert 'tinygptv_requests_total{status="500"}' not in page, "a client that leaves is no error of the server"


def test_several_ingresses_show_the_same_counters(address, settings):
    from pipelines.serving.run import deploy

    deploy(settings.model_copy(update={"num_ingresses": 2}))
    for _ in range(6):
        text_of(post(address))
    pattern = re.compile(r'tinygptv_requests_total\{ingress="(\w+)",status="200"\} (\d+)')

    def show_the_same():
        pages = [pattern.findall(httpx.get(f"{address}/metrics", timeout=120, trust_env=False).text) for _ in range(6)]
        return {tuple(sorted(page)) for page in pages} == {tuple(sorted(pages[0]))} and sums(pages[0]) == 6

    def sums(page):
        return sum(float(value) for _, value in page)

    wait_for(show_the_same)  # an ingress that answers none of the others in time shows its own alone
    deploy(settings)


def test_the_registrys_champion_replaces_the_old_model_without_a_lost_request(address, settings, registry):
    from pipelines.serving.run import deploy

    old = text_of(post(address))
    texts, failures, stop = [], [], []

    def keep_asking():
        while not stop:
            response = post(address)
            (texts if response.status_code == 200 else failures).append(
                text_of(response) if response.status_code == 200 else response.text
            )

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(keep_asking) for _ in range(2)]
        try:
            wait_for(lambda: texts)
            champion = {"artifact": "models:/tinygptv@champion", "tracking_uri": registry}
            assert deploy(settings.model_copy(update=champion)) == address
            wait_for(lambda: texts and texts[-1] != old)
        finally:
            stop.append(True)
        for asker in askers:
            asker.result()
    assert not failures
    assert len(set(texts)) == 2, "each answer is the old model's or the new one's"


def test_a_taken_port_and_a_missing_artifact_are_one_sentence(ray_cluster):
    from pipelines.serving.run import _claim_port, check_settings

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SettingsError, match=r"cannot listen on 127.0.0.1 port \d+: .*choose another port"):
            _claim_port("127.0.0.1", other.getsockname()[1])
    with pytest.raises(SettingsError, match="no checkpoint folder"):
        check_settings(ServeSettings(artifact="/nowhere"))


def test_the_job_says_what_is_wrong():
    job = [sys.executable, "jobs/serve_http.py", "artifact=/nowhere"]
    result = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: artifact '/nowhere'")
    assert "Traceback" not in result.stderr
