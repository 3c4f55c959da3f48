"""Keys and clients: who is let in, who is told apart, and that no key is ever shown."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import pickle

import pytest
from fastapi import Request

from pipelines.serving.clients import KEYS_VARIABLE, ClientIdentifier, digest_of, key_digests
from pipelines.serving.errors import ProtocolError
from pipelines.settings import ServeSettings, SettingsError
from tests.serving_api import CHAT, Client, ask, scope_of, words

pytestmark = pytest.mark.security


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def basic(password, user=""):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


KEYS = ["secret-one", "secret-two-is-longer"]


@pytest.mark.parametrize(
    "header",
    [
        {},
        bearer("wrong"),
        bearer("secret"),
        bearer("secret-on"),
        bearer("secret-one-more"),
        bearer("secret-two"),
        bearer("SECRET-ONE"),
        bearer(""),
        {"Authorization": "secret-one"},
        {"Authorization": "Basic secret-one"},
        {"Authorization": "Bearer"},
        basic("secret-one"),
        {"X-Api-Key": "secret-one"},
    ],
    ids=str,
)
def test_a_wrong_key_is_refused(header, caplog):
    caplog.set_level(logging.DEBUG)
    client = Client(api_keys=KEYS)
    response = client.chat(ask(words("hi")), headers=header)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.request("GET", "/v1/models", headers=header).status_code == 401
    assert "secret" not in caplog.text + response.text
    assert not client.backend.jobs


def test_each_key_is_let_in():
    client = Client(api_keys=KEYS)
    for key in KEYS:
        assert client.chat(ask(words("hi")), headers=bearer(key)).status_code == 200
        assert client.chat(ask(words("hi")), headers={"authorization": f"bearer   {key} "}).status_code == 200


def test_a_wrong_key_is_refused_before_the_body_is_read():
    sent = []

    async def endless():
        for _ in range(100):
            sent.append(1)
            yield b"x"

    assert Client(api_keys=KEYS).request("POST", CHAT, content=endless()).status_code == 401
    assert not sent


def test_keys_are_compared_whole(monkeypatch):
    compared = []
    real = __import__("hmac").compare_digest
    monkeypatch.setattr("pipelines.serving.clients.hmac.compare_digest", lambda a, b: compared.append(1) or real(a, b))
    Client(api_keys=["one", "two", "three"]).request("GET", "/v1/models", headers=bearer("one"))
    assert len(compared) == 3, "the first match must not end the comparison"


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/openapi.json"])
def test_pages_for_operators_are_behind_the_key_as_soon_as_there_is_one(path):
    assert Client().request("GET", path).status_code == 200
    client = Client(api_keys=KEYS)
    refused = client.request("GET", path)
    assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
    assert client.request("GET", path, headers=bearer("secret-one")).status_code == 200
    assert client.request("GET", path, headers=basic("secret-one")).status_code == 200
    for wrong in (basic("secret"), {"Authorization": "Basic ###"}, {"Authorization": "Basic /w=="}):
        assert client.request("GET", path, headers=wrong).status_code == 401
    opened = Client(api_keys=KEYS, open_paths=[path])
    assert opened.request("GET", path).status_code == 200
    others = {"/metrics", "/docs", "/openapi.json"} - {path}
    assert [opened.request("GET", other).status_code for other in others] == [401, 401], "it alone"


def test_page_and_health_need_no_key():
    client = Client(api_keys=KEYS)
    for path in ("/", "/healthz", "/ui/app.js"):
        assert client.request("GET", path).status_code == 200


def test_what_acts_takes_no_credentials_that_browsers_send_by_themselves():
    assert Client(api_keys=KEYS).chat(ask(words("hi")), headers=basic("secret-one")).status_code == 401


def salts(client, *headers):
    for header in headers:
        client.chat(ask(words("hi")), headers=header)
    return [job.salt for job in client.backend.jobs]


def test_keys_share_no_cache():
    one, two, again = salts(Client(api_keys=KEYS), bearer(KEYS[0]), bearer(KEYS[1]), bearer(KEYS[0]))
    assert one == again != two and one != 0 != two and 0 < max(one, two) < 2**63
    assert salts(Client(), {}) == [0]


def statuses(client, *requests):
    """(address, headers) of requests at once -> statuses; each answer takes its time."""
    client.backend.wait = 0.05

    async def send():
        async def one(address, headers):
            async with client.open((address, 1)) as http:
                return (await http.post(CHAT, json=ask(words("hi")), headers=headers)).status_code

        return await asyncio.gather(*(one(*request) for request in requests))

    return asyncio.run(send())


def test_a_client_is_its_key_or_its_address():
    bounds = {"max_batch_size": 4, "max_queue": 0, "max_per_client": 1}
    assert statuses(Client(**bounds), ("10.0.0.1", {}), ("10.0.0.1", {}), ("10.0.0.2", {})) == [200, 429, 200]
    keyed = Client(api_keys=KEYS, **bounds)
    one, two = bearer(KEYS[0]), bearer(KEYS[1])
    assert statuses(keyed, ("10.0.0.1", one), ("10.0.0.2", one), ("10.0.0.1", two)) == [200, 429, 200]
    network = ("2001:db8::1", {}), ("2001:db8::2", {}), ("2001:db8:0:1::1", {})
    assert statuses(Client(**bounds), *network) == [200, 429, 200]


def test_x_forwarded_for_counts_from_trusted_proxies():
    bounds = {"max_batch_size": 4, "max_queue": 0, "max_per_client": 1}
    first, second = {"X-Forwarded-For": "9.9.9.9, 1.1.1.1"}, {"X-Forwarded-For": "9.9.9.9, 2.2.2.2"}
    for proxies in (["10.0.0.1"], ["::1", "10.0.0.0/8"]):
        trusting = Client(trusted_proxies=proxies, **bounds)
        assert statuses(trusting, ("10.0.0.1", first), ("10.0.0.1", second), ("10.0.0.1", first)) == [200, 200, 429]
        assert statuses(trusting, ("11.0.0.1", first), ("11.0.0.1", second)) == [200, 429]


# ---------------------------------------------------------------------------------------------------- sources of keys


def test_keys_come_from_settings_file_and_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# for the team\nfrom-file\n\n  another \n")
    monkeypatch.setenv(KEYS_VARIABLE, "from-env, second-env\n")
    settings = ServeSettings(api_keys=["plain"], api_keys_file=str(path))
    wanted = ["plain", "from-file", "another", "from-env", "second-env"]
    assert key_digests(settings) == tuple(digest_of(key) for key in wanted)
    path.write_bytes(b"\xef\xbb\xbffrom-file\r\nanother\r\n")  # as Windows' editors write it
    assert key_digests(settings) == tuple(digest_of(key) for key in wanted)


def test_sources_without_a_key_are_refused_instead_of_opening_the_server(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    with pytest.raises(SettingsError, match="cannot be read"):
        key_digests(ServeSettings(api_keys_file=str(path)))
    path.write_text("\n# nothing\n")
    with pytest.raises(SettingsError, match="holds no key"):
        key_digests(ServeSettings(api_keys_file=str(path)))
    path.write_text("key", encoding="utf-16")
    with pytest.raises(SettingsError, match="is no text in UTF-8"):
        key_digests(ServeSettings(api_keys_file=str(path)))
    monkeypatch.setenv(KEYS_VARIABLE, " , ")
    with pytest.raises(SettingsError, match="holds no key"):
        key_digests(ServeSettings())


@pytest.mark.parametrize(
    "keys", [[""], [" "], ["good", ""], ["secret-x", None], ["secret-x "], {"secret-x": 1}, "", None, [["secret-x"]]]
)
def test_unusable_keys_are_refused_and_not_shown(keys):
    with pytest.raises(SettingsError, match=r"api_keys(\.\d)?=\.\.\. is not usable") as caught:
        ServeSettings.parse({"api_keys": keys}, "test")
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize("override", ["api_keys=", 'api_keys=[""]', "api_keys=[' ']"])
def test_an_empty_key_of_the_command_line_does_not_open_the_server(override):
    with pytest.raises(SettingsError, match="api_keys"):
        ServeSettings.load(None, [override])


def test_a_single_key_may_be_a_plain_text():
    settings = ServeSettings.load(None, ["api_keys=secret-x"])
    assert key_digests(settings) == (digest_of("secret-x"),)
    assert "secret" not in repr(settings) + str(settings.model_dump())


def test_no_key_is_in_what_ray_shows_of_the_application():
    from pipelines.serving.app import build_app

    app = build_app(
        ServeSettings(api_keys=["secret-key"], tracking_uri="postgresql://user:secret-password@host/db", artifact="x")
    )
    ingress = app._bound_deployment
    (model,) = [arg for arg in ingress.init_args if hasattr(arg, "_bound_deployment")]
    arguments = [arg for arg in (*ingress.init_args, *model._bound_deployment.init_args) if arg is not model]
    assert b"secret" not in pickle.dumps(arguments)
    assert digest_of("secret-key") in ingress.init_args[1]


def test_threads_of_replicas_on_cpus_sleep_while_they_wait(monkeypatch):
    from pipelines.serving.app import _replica_environment

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert _replica_environment(ServeSettings()) == {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
    assert _replica_environment(ServeSettings(num_gpus=1)) == {}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert _replica_environment(ServeSettings()) == {"env_vars": {"OMP_WAIT_POLICY": "ACTIVE"}}


# ------------------------------------------------------------------------------------------------ the identity itself


def request(host="10.0.0.1", **headers):
    """What a client sends, without a server."""
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(scope_of(headers=given, client=(host, 1) if host is not None else None))


KNOWN = ClientIdentifier([digest_of(key) for key in KEYS])


def test_a_client_of_a_key_has_a_name_that_is_not_the_key():
    client = KNOWN.identify(request(authorization=f"Bearer {KEYS[0]}"))
    digest = hashlib.sha256(KEYS[0].encode()).digest()
    assert client.name == f"key-{digest.hex()[:16]}"
    assert client.salt == int.from_bytes(hashlib.sha256(b"salt" + digest).digest()[:7], "big")
    assert digest_of("a") == hashlib.sha256(b"a").digest()


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::7%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),  # a client of IPv4 where the server listens on both
        ("not an address", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_client_without_a_key_is_its_address_or_its_network(host, name):
    client = ClientIdentifier(()).identify(request(host, authorization="Bearer whatever"))
    assert (client.name, client.salt) == (name, 0)


@pytest.mark.parametrize(
    ("host", "forwarded", "name"),
    [
        ("10.0.0.1", "9.9.9.9, 1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", " 1.1.1.1 ", "1.1.1.1"),
        ("10.0.0.1", "1.1.1.1, evil", "unknown"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.2", "1.1.1.1", "10.0.0.2"),
        ("::ffff:10.0.0.1", "9.9.9.9, ::ffff:1.1.1.1", "1.1.1.1"),
        ("2001:db8::1", "1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", "9.9.9.9:1, 1.1.1.1:443", "1.1.1.1"),
        ("10.0.0.1", "[2001:db8:0:7::5]:443", "2001:db8:0:7::/64"),
        ("nowhere", "1.1.1.1", "unknown"),
    ],
)
def test_the_last_address_that_a_trusted_proxy_names_counts(host, forwarded, name):
    headers = {"x_forwarded_for": forwarded} if forwarded else {}
    assert ClientIdentifier((), ["10.0.0.1", "2001:DB8:0::1"]).identify(request(host, **headers)).name == name


@pytest.mark.security
def test_a_header_of_the_clients_own_is_not_taken_for_the_proxys():
    headers = [(b"x-forwarded-for", value) for value in (b"6.6.6.6", b"7.7.7.7, 1.1.1.1")]
    given = Request(scope_of(headers=headers, client=("10.0.0.1", 1)))
    assert ClientIdentifier((), ["10.0.0.1"]).identify(given).name == "1.1.1.1"


@pytest.mark.parametrize(
    ("header", "known"),
    [
        (basic("secret-one"), True),
        (basic("secret-one", user="any:body"), False),
        (basic("secret-one", user="anybody"), True),
        ({"Authorization": basic("secret-one")["Authorization"].replace("Basic", "bASIC")}, True),
        (bearer("secret-one"), True),
        ({"Authorization": "Basic " + base64.b64encode(b"secret-one").decode()}, False),
        ({"Authorization": "Basic secret-one"}, False),
        ({"Authorization": "Basic " + base64.b64encode(b":secret-one").decode() + "!"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_browser_may_send_the_key_as_its_password(header, known):
    given = request(authorization=header.get("Authorization", ""))
    if known:
        assert KNOWN.identify_browser(given) == KNOWN.identify(request(authorization="Bearer secret-one"))
    else:
        with pytest.raises(ProtocolError) as caught:
            KNOWN.identify_browser(given)
        assert caught.value.message == "this server needs an API key: send it as 'Authorization: Bearer <key>'."
    open_to_all = ClientIdentifier(()).identify_browser(given)
    assert (open_to_all.name, open_to_all.salt) == ("10.0.0.1", 0)


def test_a_password_may_hold_a_colon_and_keys_are_no_bytes_of_other_encodings():
    colon = ClientIdentifier([digest_of("a:b"), digest_of("ü")])
    assert colon.identify_browser(request(authorization=basic("a:b")["Authorization"])).name.startswith("key-")
    assert colon.identify_browser(request(authorization=basic("ü")["Authorization"])).name.startswith("key-")


def test_each_key_counts_once_and_a_file_of_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keys").write_text("same\n  # a comment\n same \nwith space inside\n")
    monkeypatch.setenv(KEYS_VARIABLE, "same,other\tsame")
    settings = ServeSettings(api_keys=["same"], api_keys_file="~/keys")
    assert key_digests(settings) == tuple(map(digest_of, ("same", "with space inside", "other")))
    with pytest.raises(SettingsError) as caught:
        key_digests(ServeSettings(api_keys_file="~/none"))
    assert str(caught.value) == f"api_keys_file={tmp_path}/none cannot be read: No such file or directory."
    (tmp_path / "keys").write_text("#\n")
    with pytest.raises(SettingsError) as caught:
        key_digests(ServeSettings(api_keys_file="~/keys"))
    assert str(caught.value) == (
        f"api_keys_file={tmp_path}/keys holds no key: write one per line, or leave the setting empty."
    )
    monkeypatch.setenv(KEYS_VARIABLE, "")
    with pytest.raises(SettingsError, match=f"environment variable {KEYS_VARIABLE} holds no key: set one, or unset it"):
        key_digests(ServeSettings(api_keys=["plain"]))
