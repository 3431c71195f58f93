"""Requests to slurmrestd, and handling of its answers, without Slurm."""

import base64
import datetime as dt
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from isthmus_bridge.slurm import in_flight
from isthmus_bridge.slurm.model import Gres, Patience, SlurmError, SubmissionAmbiguous, SubmissionRefused
from isthmus_bridge.slurm.rest import format as rest_format
from isthmus_bridge.slurm.rest.adapter import RestAdapter, submitted
from isthmus_bridge.slurm.rest.http import BrokenError, Endpoint, NotSentError, endpoint, exchange
from isthmus_bridge.slurm.rest.token import TokenCommand, TokenFile
from isthmus_contracts.wire.pki import Authority

from .test_cli_adapter import submission

JWT = "aGVhZA.e30.c2ln"
OPENAPI = {"paths": {f"/slurm/v0.0.{number}/job/submit": {} for number in (39, 40, 41)}}


def http(content: Any, status: int = 200) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class Daemon:
    """Server on a UNIX socket with preset answers by path; ``None`` for no answer."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, Any] = {"/openapi/v3": http(OPENAPI)}
        self.heard: list[bytes] = []
        self.endpoint = Endpoint("localhost", socket=folder / "s")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / "s"))
        self._socket.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            request = file.readline()
            length = 0
            while (line := file.readline()).strip():
                request += line
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            request += b"\n" + file.read(length)
            self.heard.append(request)
            answer = self.answers.get(request.split()[1].decode(), http({"errors": []}, 404))
            if callable(answer):
                answer = answer(request)
            if answer is None:
                file.read()
                return
            for part in [answer] if isinstance(answer, bytes) else answer:
                try:
                    connection.sendall(part)
                except OSError:
                    return


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path)
    yield one
    one.close()


@pytest.fixture
def adapter(daemon: Daemon, tmp_path: Path) -> RestAdapter:
    return made(daemon, tmp_path)


def made(daemon: Daemon, folder: Path, timeout: float = 10.0) -> RestAdapter:
    (folder / "token").write_text(f"SLURM_JWT={JWT}\n")
    (folder / "batch.sh").write_text("#!/bin/bash\ntrue\n")
    return RestAdapter("isthmus-", daemon.endpoint, TokenFile(folder / "token"), timeout=timeout)


def test_the_newest_version_that_both_know(daemon: Daemon, adapter: RestAdapter) -> None:
    assert adapter.version() == 41
    assert JWT.encode() in daemon.heard[0] and b"X-SLURM-USER-NAME: " in daemon.heard[0]
    adapter.version()
    assert len(daemon.heard) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http({"paths": {"/slurm/v0.0.99/job/submit": {}}}), "it offers v0.0.99, this bridge supports v0.0.36 to"),
        (http(b"<html>"), "it offers no version of its API"),
    ],
    ids=["unknown", "none"],
)
def test_a_version_that_is_not_known(daemon: Daemon, adapter: RestAdapter, answer: bytes, said: str) -> None:
    daemon.answers = {"/openapi/v3": answer}
    with pytest.raises(SlurmError, match=said):
        adapter.jobs()


@pytest.mark.parametrize("version", [38, 42])
def test_the_body_of_a_submission(version: int, tmp_path: Path) -> None:
    wanted = submission(
        tmp_path, account="p1", qos="q", at_once=4, gres=(Gres("gpu", "a100", 2),), script=tmp_path / "a b" / "x.sh"
    )
    body = rest_format.submission(version, wanted, "#!/bin/bash\n", {"PATH": "/bin"})
    job = body["job"]
    assert (job["array"], job["account"], job["qos"], job["requeue"]) == ("0-7%4", "p1", "q", True)
    if version < 40:
        assert (job["time_limit"], job["memory_per_node"], job["gres"]) == (61, 512, "gpu:a100:2")
        assert job["environment"] == {"PATH": "/bin"}
        assert "sleep 3600 && kill -TERM" in body["script"]
        assert body["script"].endswith(f"exec /bin/bash '{tmp_path}/a b/x.sh'\n")
    else:
        assert job["time_limit"] == {"set": True, "infinite": False, "number": 61}
        assert (job["tres_per_node"], job["kill_warning_flags"]) == ("gres/gpu:a100:2", ["BATCH_JOB"])
        assert (job["environment"], body["script"]) == (["PATH=/bin"], "#!/bin/bash\n")


def error(number: int, words: str, **more: Any) -> dict[str, Any]:
    return {"errors": [{"error_number": number, "error": words}], **more}


def test_accepted() -> None:
    assert submitted(200, json.dumps({"job_id": 17, "errors": []}).encode()) == 17
    # Slurm 22.05 answers like this while nodes are down.
    assert submitted(200, json.dumps(error(2015, "Required node not available", job_id=17)).encode()) == 17


@pytest.mark.parametrize(
    ("number", "words", "patience"),
    [
        (2000, "Invalid partition name specified", Patience.NONE),
        (2051, "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", Patience.QUEUE),
        (2016, "Required partition not available (inactive or drain)", Patience.QUEUE),
        (9001, "Failure during parsing", Patience.NONE),
    ],
)
def test_refused(number: int, words: str, patience: Patience) -> None:
    with pytest.raises(SubmissionRefused, match="Slurm refused: ") as caught:
        submitted(500, json.dumps(error(number, words)).encode())
    assert caught.value.patience is patience


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (500, error(5005, "Zero Bytes were transmitted or received")),
        (500, error(-1, "Unspecified error")),
        (500, error(2000, "Unable to contact slurm controller")),
        (500, {"errors": [{"error": "no number"}]}),
        (200, {"job_id": 0, "errors": []}),
        (401, b"Authentication failure"),
        (502, b"<html>Bad gateway</html>"),
        (200, b""),
    ],
    ids=["zero-bytes", "unspecified", "contact", "numberless", "no-id", "token", "proxy", "empty"],
)
def test_ambiguous(status: int, content: Any) -> None:
    with pytest.raises(SubmissionAmbiguous):
        submitted(status, content if isinstance(content, bytes) else json.dumps(content).encode())


SUBMIT = "/slurm/v0.0.41/job/submit"


def test_a_request_is_under_way_until_it_is_answered(daemon: Daemon, tmp_path: Path) -> None:
    adapter = made(daemon, tmp_path)
    daemon.answers[SUBMIT] = lambda request: (
        http({"job_id": 17}) if in_flight.may_run(tmp_path) else http(error(1, "it was not announced"), 500)
    )
    assert adapter.submit(submission(tmp_path)) == 17
    assert not adapter.submission_may_run(tmp_path)
    daemon.answers[SUBMIT] = http(error(2000, "Invalid partition name specified"), 500)
    with pytest.raises(SubmissionRefused):
        adapter.submit(submission(tmp_path))
    assert not adapter.submission_may_run(tmp_path)


def drip() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 X\r\nContent-Length: 100000\r\n\r\n"
    while True:
        time.sleep(0.1)
        yield b" "


@pytest.mark.parametrize(
    ("answer", "said", "timeout"),
    [
        (None, "no answer in time", 3.0),
        (lambda request: drip(), "in time", 3.0),
        (b"", ".", 60.0),
        (b"HTTP/1.1 200 X\r\nContent-Length: 900\r\n\r\n{", "cut off", 60.0),
    ],
    ids=["silent", "dripping", "closed", "cut"],
)
def test_a_partial_answer_is_ambiguous(daemon: Daemon, tmp_path: Path, answer: Any, said: str, timeout: float) -> None:
    adapter = made(daemon, tmp_path, timeout=timeout)
    daemon.answers[SUBMIT] = answer
    daemon.answers["/slurm/v0.0.41/jobs"] = answer
    began = time.monotonic()
    with pytest.raises(SubmissionAmbiguous, match=said):
        adapter.submit(submission(tmp_path))
    assert time.monotonic() - began < 60
    # Neither this process nor another submits again: slurmrestd may still be processing the request.
    assert adapter.submission_may_run(tmp_path)
    with pytest.raises(SubmissionAmbiguous, match="an earlier submission"):
        adapter.submit(submission(tmp_path))
    assert sum(SUBMIT.encode() in request for request in daemon.heard) == 1
    with pytest.raises(SlurmError):
        adapter.jobs()


def test_a_missing_server_is_a_temporary_refusal(daemon: Daemon, adapter: RestAdapter, tmp_path: Path) -> None:
    adapter.version()
    daemon.close()
    with pytest.raises(SubmissionRefused) as caught:
        adapter.submit(submission(tmp_path))
    assert caught.value.patience is Patience.QUEUE and not adapter.submission_may_run(tmp_path)


def test_a_malformed_announcement_counts(tmp_path: Path) -> None:
    in_flight.announce(tmp_path, 0.0)
    assert not in_flight.may_run(tmp_path)
    (tmp_path / "request.until").write_text("soon")
    assert in_flight.may_run(tmp_path)


def number(value: int | None) -> dict[str, Any]:
    return {"set": value is not None, "infinite": False, "number": value or 0}


NEW = {
    "job_id": 18, "array_job_id": number(17), "array_task_id": number(0), "array_task_string": "", "name": "isthmus-x",
    "user_id": os.getuid(), "job_state": ["RUNNING"], "state_reason": "None", "restart_cnt": 1, "nodes": "n1",
    "exit_code": {"status": ["SUCCESS"], "return_code": number(3), "signal": {"id": number(9), "name": "KILL"}},
    "start_time": number(100), "submit_time": number(90), "end_time": number(700),
    "current_working_directory": "/run/x",
}  # fmt: skip
OLD = {
    **NEW, "array_job_id": 17, "array_task_id": 0, "job_state": "RUNNING", "exit_code": 3 << 8 | 9,
    "start_time": 100, "submit_time": 90, "end_time": 700,
}  # fmt: skip


@pytest.mark.parametrize("job", [OLD, NEW], ids=["old", "new"])
def test_both_forms_of_a_job_say_the_same(job: dict[str, Any]) -> None:
    (record,) = rest_format.jobs({"jobs": [job]}, os.getuid())
    assert (record.job_id, record.array_id, record.indices, record.state) == (18, 17, (0,), "RUNNING")
    assert (record.exit_code, record.signal, record.restarts, record.reason) == (3, 9, 1, "")
    assert (record.start, record.submitted, record.ends, record.node) == (100.0, 90.0, 700.0, "n1")
    assert record.directory == "/run/x"


def test_whose_job_it_is_counts() -> None:
    others = [{**NEW, "user_id": os.getuid() + 1}]
    assert rest_format.jobs({"jobs": others}, os.getuid()) == []


@pytest.mark.parametrize(
    ("changes", "state", "indices"),
    [
        ({"array_task_string": "2-4,9%2", "array_task_id": number(None)}, "RUNNING", (2, 3, 4, 9)),
        ({"array_task_string": "1,3,5,...", "array_task_id": number(None)}, "RUNNING", None),
        ({"job_state": ["CANCELLED", "COMPLETING"]}, "COMPLETING", (0,)),
        ({"job_state": ["PENDING", "REQUEUED"]}, "REQUEUED", (0,)),
    ],
    ids=["waiting", "cut-off", "completing", "requeued"],
)
def test_states_and_indices(changes: dict[str, Any], state: str, indices: tuple[int, ...] | None) -> None:
    (record,) = rest_format.jobs({"jobs": [{**NEW, **changes}]}, os.getuid())
    assert (record.state, record.indices) == (state, indices)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"jobs": None},
        {"jobs": [17]},
        {"jobs": [{key: value for key, value in NEW.items() if key != "name"}]},
        {"jobs": [{**NEW, "job_state": []}]},
        {"jobs": [{**NEW, "job_id": "18"}]},
        {"jobs": [{**NEW, "array_task_string": "all"}]},
    ],
    ids=["nothing", "null", "number", "nameless", "stateless", "text-id", "words"],
)
def test_half_an_answer_is_an_error(daemon: Daemon, adapter: RestAdapter, content: dict[str, Any]) -> None:
    daemon.answers["/slurm/v0.0.41/jobs"] = http(content)
    with pytest.raises(SlurmError):
        adapter.jobs()


def test_a_job_of_another_name_is_not_cancelled(daemon: Daemon, adapter: RestAdapter) -> None:
    daemon.answers["/slurm/v0.0.41/job/17"] = http({"jobs": [{**NEW, "name": "another"}]})
    adapter.cancel("isthmus-x", 17)
    assert not any(request.startswith(b"DELETE") for request in daemon.heard)
    # Only some tasks of the array were renamed.
    daemon.answers["/slurm/v0.0.41/job/17"] = http({"jobs": [{**NEW, "name": "another"}, NEW]})
    adapter.cancel("isthmus-x", 17)
    assert sum(request.startswith(b"DELETE") for request in daemon.heard) == 1


def test_failing_accounting_is_distinguished_from_missing_accounting(daemon: Daemon, adapter: RestAdapter) -> None:
    daemon.answers["/slurm/v0.0.41/partitions"] = http({"partitions": [], "meta": {"slurm": {"release": "24.11.5"}}})
    asked: list[bytes] = []

    def answer(request: bytes) -> bytes:
        asked.append(request)
        return http(error(7000, "Unable to connect to database"), 500)

    query = None

    class Answers(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return query if key.startswith("/slurmdb/") else super().get(key, default)

    daemon.answers = Answers(daemon.answers)
    query = answer
    for _ in range(2):
        with pytest.raises(SlurmError, match="Unable to connect to database"):
            adapter.history(["isthmus-x"], 0.0)
    query = http(b"not here", 404)
    assert adapter.history(["isthmus-x"], 0.0) == []
    assert adapter.describe().version == "24.11.5" and len(asked) == 2


def token(ends: float) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"exp": ends}).encode()).decode().rstrip("=")
    return f"e30.{claims}.x"


def test_tokens_are_renewed_before_they_end() -> None:
    now = [1000.0]
    made: list[str] = []

    def run(argv: Any) -> str:
        made.append(token(now[0] + 100))
        return f"SLURM_JWT={made[-1]}\n"

    source = TokenCommand(["scontrol", "token"], run, lambda: now[0])
    assert source.get() == source.get() == made[-1] and len(made) == 1
    now[0] += 79
    source.get()
    assert len(made) == 1
    now[0] += 2
    assert source.get() == made[1]
    # A token that the server refuses is replaced, but not at every request.
    assert not source.invalidate(made[1])
    now[0] += 31
    assert source.invalidate(made[1]) and source.get() == made[2]


@pytest.mark.parametrize("said", ["", "two words", f"{token(1.0)}\n", "a.b"], ids=["empty", "words", "ended", "short"])
def test_malformed_tokens_are_never_shown(said: str, tmp_path: Path) -> None:
    sources: list[Callable[[], str]] = [TokenCommand(["give"], lambda argv: said).get]
    (tmp_path / "token").write_text(said)
    sources.append(TokenFile(tmp_path / "token").get)
    for get in sources:
        with pytest.raises(SlurmError, match=r"^token: ") as caught:
            get()
        assert not said.strip() or said.strip() not in str(caught.value)


def test_a_query_is_repeated_with_a_newer_token(daemon: Daemon) -> None:
    now = [1000.0]
    given = iter(["e30.old.x", "e30.new.x"])
    source = TokenCommand(["give"], lambda argv: next(given), lambda: now[0])
    adapter = RestAdapter("isthmus-", daemon.endpoint, source)
    adapter.version()
    daemon.answers["/slurm/v0.0.41/jobs"] = lambda request: (
        http({"jobs": []}) if b"e30.new.x" in request else http(error(-1, "Unspecified error"), 500)
    )
    with pytest.raises(SlurmError, match="Unspecified error"):
        adapter.jobs()
    now[0] += 60
    assert adapter.jobs() == []


@pytest.mark.parametrize(
    "url", ["http://slurm.example:6820", "ftp://x", "unix:relative", "https://host:99999", "https://u:p@host", "x"]
)
def test_malformed_addresses(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not|in the clear"):
        endpoint(url)


def test_https_needs_a_trusted_certificate(tmp_path: Path) -> None:
    authority = Authority.create("site", dt.timedelta(days=1))
    authority.issue("slurmrestd", dt.timedelta(days=1), hosts=["localhost"]).write(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(65536)
                    secured.sendall(http({"good": True}))

        threading.Thread(target=serve, daemon=True).start()
        to = endpoint(f"https://localhost:{server.getsockname()[1]}")
        options: dict[str, Any] = {"headers": {}, "body": None, "timeout": 30.0, "limit": 100}
        with pytest.raises(NotSentError, match=r"(?i)certificate"):
            exchange(to, "GET", "/", **options)
        assert exchange(to, "GET", "/", **options, ca_file=tmp_path / "ca.crt") == (200, b'{"good": true}')


def test_an_answer_is_bounded(daemon: Daemon) -> None:
    daemon.answers["/"] = http(b"x" * 100_000)
    with pytest.raises(BrokenError, match="longer than 1000 bytes"):
        exchange(daemon.endpoint, "GET", "/", headers={}, body=None, timeout=60, limit=1000)


def test_addresses() -> None:
    assert endpoint("unix:/run/s.sock") == Endpoint("localhost", socket=Path("/run/s.sock"))
    assert endpoint("https://h.example:6820") == Endpoint("h.example", 6820, tls=True)
    assert endpoint("http://[::1]:6820/") == Endpoint("[::1]", 6820)
