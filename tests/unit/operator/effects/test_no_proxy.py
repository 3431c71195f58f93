"""Tests of the hosts that the operator and the ``isthmus`` command reach without a proxy."""

from collections.abc import Callable

import pytest
import urllib3
from kubernetes import client

from isthmus.cluster.api import _connections
from isthmus_operator.effects.kube import connections


@pytest.mark.parametrize("make", [lambda made: connections(made, 1), _connections])
@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("https://10.96.0.1:443", "10.96.0.0/12,.svc", True),
        ("https://kubernetes.default.svc:443", "10.96.0.0/12,.svc", True),
        ("https://api.example:6443", "api.example", True),
        ("https://api.example:6443", "*", True),
        ("https://10.97.0.1:443", "10.96.0.0/16", False),
        ("https://api.example:6443", "example.org", False),
        ("https://api.example:6443", "", False),
        ("https://api.example:6443", None, False),
    ],
)
def test_no_proxy(
    make: Callable[[client.Configuration], urllib3.PoolManager],
    host: str,
    no_proxy: str | None,
    direct: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    if no_proxy is not None:
        monkeypatch.setenv("NO_PROXY", no_proxy)
    configuration = client.Configuration(host=host)
    assert configuration.proxy == "http://proxy.example:3128"
    assert isinstance(make(configuration), urllib3.ProxyManager) is not direct
