"""Tests of the flags and their environment variables."""

import pytest

from isthmus_operator.__main__ import parse
from isthmus_operator.app import App


def test_flags() -> None:
    settings = parse(["-n", "a", "--namespace=b", "--cluster=c1", "--resync", "1.5", "--workers=2"])
    assert settings.namespaces == ("a", "b")
    assert (settings.cluster, settings.resync, settings.workers) == ("c1", 1.5, 2)
    assert (settings.metrics, settings.health) == ("[::]:8080", "[::]:8081")
    assert parse(["-A"]).namespaces == ()


def test_the_place_of_the_signing_root(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["-A"]).signing_root == ""
    assert parse(["-A", "--signing-root=keys/root"]).signing_root == "keys/root"
    with pytest.raises(SystemExit):
        parse(["-A", "--signing-root=root"])
    assert "--signing-root: 'root' is not of the form NAMESPACE/NAME" in capsys.readouterr().err


def test_namespaces_can_be_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(parse(["-A", "--exclude-namespace", "a", "--exclude-namespace=b"]))
    assert app.settings.excluded == {"a", "b"}
    added: list[tuple[str, str]] = []
    monkeypatch.setattr(App, "queue", type("Queue", (), {"add": staticmethod(added.append)}), raising=False)
    for namespace in ("a", "c"):
        metadata = {"name": "demo", "namespace": namespace, "uid": f"u-{namespace}", "resourceVersion": "1",
                    "creationTimestamp": "2030-01-01T00:00:00Z"}  # fmt: skip
        app.job_seen({"metadata": metadata, "spec": {}})
    assert added == [("c", "demo")]
    monkeypatch.setenv("ISTHMUS_EXCLUDE_NAMESPACES", "x,y")
    assert parse(["-A"]).excluded == {"x", "y"}


def test_the_environment_stands_in_for_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_NAMESPACES", "x,y")
    monkeypatch.setenv("ISTHMUS_SITE_GIVE_UP", "60")
    settings = parse([])
    assert (settings.namespaces, settings.site_give_up) == (("x", "y"), 60.0)
    assert parse(["--all-namespaces"]).namespaces == ()
    monkeypatch.delenv("ISTHMUS_NAMESPACES")
    monkeypatch.setenv("ISTHMUS_ALL_NAMESPACES", "1")
    assert parse([]).namespaces == ()


@pytest.mark.parametrize(
    "arguments",
    [[], ["-A", "-n", "a"], ["-n", "Not-A-Name"], ["-A", "--resync=0"], ["-A", "--workers=none"],
     ["-A", "--metrics=8080"], ["-A", "--log-level=loud"], ["-A", "--health=:99999"],
     ["-A", "--metrics=fd00::1:80"], ["-n", "a", "--exclude-namespace=b"],
     ["-A", "--exclude-namespace=B"]],
)  # fmt: skip
def test_nonsense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2
    assert "isthmus-operator: error:" in capsys.readouterr().err


def test_what_templates_may_name_is_part_of_what_they_may_do() -> None:
    settings = parse(
        ["-A", "--allow-in-templates=host-path", "--secrets-in-templates=a-*, b", "--config-maps-in-templates=c"]
    )
    assert settings.allow_in_templates == {"host-path", "secret=a-*", "secret=b", "config-map=c"}
