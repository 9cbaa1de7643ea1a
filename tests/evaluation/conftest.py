"""Waits of clients are short in these tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from helpers.evaluation import generators


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    import openai._base_client

    monkeypatch.setattr(generators, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
