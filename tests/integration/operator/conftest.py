"""Fixtures: a fake API server, and operators as processes that use it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .fake_api_server import ApiServer
from .operator_process import Operator


@pytest.fixture
def api() -> Iterator[ApiServer]:
    """Yield a fake API server that contains only kube-system."""
    with ApiServer() as server:
        yield server


@pytest.fixture
def operator(api: ApiServer, tmp_path: Path) -> Iterator[Operator]:
    """Yield an operator that is not started yet."""
    process = Operator(api.kubeconfig(tmp_path / "kubeconfig"), tmp_path / "operator.log")
    try:
        yield process
    finally:
        process.stop()
        if process.log.exists():
            print(process.log.read_text(encoding="utf-8"))
