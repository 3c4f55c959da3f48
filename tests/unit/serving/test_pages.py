"""The page's files: each at its address with its type, nothing from elsewhere, no name in it that is not there."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from pipelines.serving.pages import HEADERS, TYPES
from pipelines.serving.protocol import TaskName
from pipelines.settings import ServeSettings
from tests.paths import ROOT
from tests.serving_api import Client
from tinygptv.data.boxes import COLOURS
from tinygptv.data.conversation import TASKS

UI = ROOT / "pipelines/serving/ui"
ADDRESSES = {"index.html": "/", "docs.html": "/docs"}


def path_of(name):
    return ADDRESSES.get(name, f"/ui/{name}")


@pytest.fixture(scope="module")
def client():
    return Client()


@pytest.mark.parametrize("file", sorted(UI.iterdir()), ids=lambda file: file.name)
def test_a_file_is_served_as_it_is(client, file):
    kinds = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    kinds |= {"js": "text/javascript; charset=utf-8", "jpg": "image/jpeg"}
    response = client.request("GET", path_of(file.name))
    assert response.status_code == 200 and response.content == file.read_bytes()
    assert response.headers["content-type"] == kinds[file.suffix[1:]]
    assert {name: response.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.security
def test_pages_load_nothing_from_elsewhere_and_stand_in_no_frame():
    rules = dict(rule.strip().split(" ", 1) for rule in HEADERS["Content-Security-Policy"].split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    others = {name: value for name, value in HEADERS.items() if name != "Content-Security-Policy"}
    assert others == {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def test_only_the_files_of_the_page_have_an_address(client):
    assert {file.suffix for file in UI.iterdir()} <= set(TYPES)
    for path in ("/ui/", "/ui/index.html", "/ui/docs.html", "/ui/nothing.js", "/index.html", "/app.js"):
        assert client.request("GET", path).status_code == 404


def test_what_the_pages_name_is_there(client):
    """Files of scripts and styles, and the elements that scripts look up by their id."""
    for page, scripts in (("index.html", ("app.js",)), ("docs.html", ("docs.js",))):
        text = (UI / page).read_text()
        for name in re.findall(r'(?:src|href)="([^"#:]+)"', text):
            assert client.request("GET", f"/{name.lstrip('/')}").status_code == 200, (page, name)
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        assert len(ids) == len(re.findall(r'\bid="([^"]+)"', text)), "an id is of one element"
        for script in scripts:
            wanted = set(re.findall(r'(?:getElementById|\$)\("([^"]+)"\)', (UI / script).read_text()))
            assert wanted <= ids, (script, wanted - ids)
    for script in UI.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', script.read_text()):
            assert (UI / name).is_file(), (script.name, name)


def test_scripts_and_server_agree():
    """What both sides write down: colours, tasks, addresses, and sizes that the server takes."""
    app, api, markup, image = ((UI / f"{name}.js").read_text() for name in ("app", "api", "markup", "image"))
    colours = re.findall(r"#[0-9a-f]{6}", markup[markup.index("COLOURS = [") : markup.index("];")])
    assert colours == ["#{:02x}{:02x}{:02x}".format(*colour) for colour in COLOURS]
    assert re.findall(r'\{ id: "(\w*)", name', app) == ["", *TASKS] and set(TASKS) == set(get_args(TaskName))
    optional = re.findall(r'id: "(\w+)"[^}]*optional: true', app)
    assert optional == [task for task in TASKS if task in ("caption", "identify", "grounding")]
    examples = re.findall(r'file: "ui/([^"]+)", task: "(\w+)"', app)
    assert len(examples) == 4 and all((UI / file).is_file() and task in TASKS for file, task in examples)
    asked = set(re.findall(r'request\("([^"]+)"', api))
    served = {getattr(route, "path", "") for route in Client().app.routes}
    assert len(asked) == 4 and {f"/{path}" for path in asked} <= served
    side, size = (int(re.search(rf"{name} = ([\d_]+)", image)[1]) for name in ("LARGEST_SIDE", "LARGEST_BYTES"))
    settings = ServeSettings()
    assert size <= settings.max_image_mb * 1e6 and size * 4 / 3 < settings.max_body_mb * 1e6
    assert side**2 <= settings.max_image_megapixels * 1e6
    assert 'DRAWN = "drawn scenes"' in app, "as the API asks of a model before it draws one"
