"""Pages in a browser, and clients that do not wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from helpers.evaluation import endpoint
from tests.evaluation.pages import write_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

    from tests.evaluation.pages import Open


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    import openai._base_client

    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    yield context
    context.close()


@pytest.fixture
def noise() -> list[str]:
    """Errors, dialogs and whatever else the pages of a test must not cause."""
    return []


@pytest.fixture
def open_page(context: BrowserContext, noise: list[str], tmp_path: Path) -> Iterator[Open]:
    """Writes a page and opens it; in the end it has asked for nothing but its file, and nothing went wrong in it."""
    pages: list[Page] = []

    def open_page(*words: Any, **options: Any) -> Page:
        file = write_page(tmp_path, *words, **options)
        page = context.new_page()
        pages.append(page)
        page.on("request", lambda request: request.url == file.as_uri() or noise.append(f"request: {request.url}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on("console", lambda line: noise.append(f"console: {line.text}"))
        page.on("dialog", lambda dialog: (noise.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield open_page
    for page in pages:
        page.evaluate("localStorage.clear()")
        page.close()
    assert noise == []
