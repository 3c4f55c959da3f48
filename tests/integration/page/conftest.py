"""The web page in headless Chromium; skipped where there is no browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.page import Server, open_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="package")
def browser():
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = driver.chromium.launch(executable_path=BROWSER, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def page(browser, server):
    server.model.__init__()
    yield from open_page(browser, server)
