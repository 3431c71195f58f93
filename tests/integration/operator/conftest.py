"""Fixtures: a stand-in API server, and operators as processes of their own against it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .fake_api_server import ApiServer
from .operator_process import Operator


@pytest.fixture
def api() -> Iterator[ApiServer]:
    """An API server that holds nothing but kube-system."""
    with ApiServer() as server:
        yield server


@pytest.fixture
def operator(api: ApiServer, tmp_path: Path) -> Iterator[Operator]:
    """The operator, not yet started."""
    process = Operator(api.kubeconfig(tmp_path / "kubeconfig"), tmp_path / "operator.log")
    try:
        yield process
    finally:
        process.stop()
        if process.log.exists():
            print(process.log.read_text(encoding="utf-8"))
