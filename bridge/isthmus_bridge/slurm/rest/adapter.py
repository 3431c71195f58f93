"""The adapter for slurmrestd, Slurm's REST daemon. It needs no Slurm programs on this machine."""

import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import untrusted_files
from .. import in_flight, submission_errors
from ..environment import DEFAULT_PATH, job_environment, user_name
from ..model import (
    Patience,
    SiteDescription,
    SlurmError,
    Submission,
    SubmissionAmbiguous,
    SubmissionRefused,
    TaskRecord,
)
from . import format
from .http import BrokenError, Endpoint, NotSentError, exchange
from .token import TokenCommand, TokenFile

# Limit of an answer in bytes: the whole queue of the cluster, with some hundred thousand jobs, is below it.
_MAX_ANSWER = 512 << 20
# Time for which slurmrestd may continue after its client gave up: twice its time-out towards the controller. Seconds.
_SETTLE = 30.0
_DESCRIBE_AGAIN = 3600.0
_VERSION = re.compile(rb"/slurm\\?/v0\.0\.(\d{2,3})\\?/job\\?/submit")
# The error numbers of clear refusals: by the controller, and by slurmrestd because of the request.
_REFUSED = (range(2000, 3000), range(9000, 10000))
_NO_SUCH_JOB = frozenset({2017, 2021})  # unknown; already over
# Errors of some versions if the controller did not accept the token: "unspecified", and "zero bytes".
_PERHAPS_TOKEN = frozenset({-1, 1007, 5005})

Observer = Callable[[str, float, bool], None]


class RestAdapter:
    """The :class:`~..model.SlurmAdapter` for slurmrestd. A token is of one user, so the policy allows no others."""

    def __init__(
        self,
        prefix: str,
        endpoint: Endpoint,
        token: TokenFile | TokenCommand,
        *,
        ca_file: Path | None = None,
        timeout: float = 30.0,
        observer: Observer = lambda program, seconds, ok: None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._prefix = prefix
        self._endpoint = endpoint
        self._token = token
        self._ca_file = ca_file
        self._timeout = timeout
        self._observer = observer
        self._uid = os.getuid()
        outer = os.environ if environ is None else environ
        self._user = user_name(outer)
        self._environment = job_environment(DEFAULT_PATH, outer)
        self._lock = threading.Lock()
        self._version = 0
        self._description: SiteDescription | None = None
        self._described = 0.0

    def submit(self, submission: Submission) -> int:
        """POST /slurm/…/job/submit, once. After an error it is unknown whether Slurm received the job."""
        try:
            version, token = self.version(), self._token.get()
            script = untrusted_files.read(submission.script).decode()
        except OSError as error:
            raise SubmissionRefused(f"cannot read {submission.script}: {error.strerror}", Patience.QUEUE) from None
        except SlurmError as error:
            raise SubmissionRefused(str(error), Patience.QUEUE) from None
        body = format.submission(version, submission, script, self._environment)
        try:
            in_flight.announce(submission.directory, self._timeout + _SETTLE)
        except OSError as error:
            message = f"cannot write in {submission.directory}: {error.strerror}"
            raise SubmissionRefused(message, Patience.QUEUE) from None
        path = f"/slurm/v0.0.{version}/job/submit"
        try:
            status, content = self._exchange("submit", "POST", path, token, json.dumps(body).encode())
        except NotSentError as error:
            in_flight.settle(submission.directory)
            raise SubmissionRefused(f"slurmrestd: {error}", Patience.QUEUE) from None
        except BrokenError as error:
            raise SubmissionAmbiguous(f"slurmrestd: {error}") from None
        try:
            job = submitted(status, content)
        except SubmissionRefused:
            in_flight.settle(submission.directory)
            raise
        except SubmissionAmbiguous:
            self._token.invalidate(token)
            # slurmrestd has answered, so the request is over. The queue shows whether the controller received it.
            in_flight.settle(submission.directory)
            raise
        in_flight.settle(submission.directory)
        return job

    def submission_may_run(self, directory: Path) -> bool:
        """Return whether slurmrestd may still be processing a request from this directory."""
        return in_flight.may_run(directory)

    def jobs(self, users: Collection[str] = ()) -> Sequence[TaskRecord]:
        """GET /slurm/…/jobs: slurmrestd cannot filter by user, so it sends the whole queue."""
        return format.jobs(self._ask("jobs", "slurm", "jobs"), self._uid)

    def history(self, names: Sequence[str], since: float, user: str = "") -> Sequence[TaskRecord]:
        """GET /slurmdb/…/jobs, if the site has slurmdbd."""
        if not self.describe().accounting:
            return []
        query = urllib.parse.urlencode(
            {
                "job_name": ",".join(names),
                "users": self._user,
                # Start a day early, for clocks that disagree.
                "start_time": str(int(max(0.0, since - 86400))),
            }
        )
        answer = self._ask("history", "slurmdb", f"jobs?{query}")
        return format.history(answer, frozenset(names), self._user)

    def cancel(self, name: str, array_id: int, first: int = 0, last: int | None = None, user: str = "") -> None:
        """GET, then DELETE /slurm/…/job/ID. Name and owner are checked first, since Slurm may reuse an id."""
        answer = self._ask("job", "slurm", f"job/{array_id}", accept=_NO_SUCH_JOB)
        if format.errors(answer):
            return
        found = format.owners(answer)
        # The names of some tasks may have been changed: they belong to the same array.
        if (name, self._uid) in found:
            for which in self._named(array_id, first, last):
                self._ask("cancel", "slurm", f"job/{which}", method="DELETE", accept=_NO_SUCH_JOB)

    def _named(self, array_id: int, first: int, last: int | None) -> list[str]:
        """Return the ids to cancel, in the notation of the API's version."""
        if last is None:
            return [str(array_id)]
        if self.version() < format.TYPED:
            return [urllib.parse.quote(f"{array_id}_[{first}-{last}]")]
        return [f"{array_id}_{index}" for index in range(first, last + 1)]

    def describe(self) -> SiteDescription:
        """GET /slurm/…/partitions and /slurmdb/…/jobs, at most once an hour."""
        if self._description is None or time.monotonic() > self._described + _DESCRIBE_AGAIN:
            # Not ping, which needs no valid token, and does not involve the controller.
            version, cluster = format.about(self._ask("describe", "slurm", "partitions"))
            self._description = SiteDescription(version, cluster, self._accounting(), max_array_size=0)
            self._described = time.monotonic()
        return self._description

    def partitions(self) -> list[str]:
        """GET /slurm/…/partitions."""
        return sorted(set(format.partitions(self._ask("describe", "slurm", "partitions"))))

    def version(self) -> int:
        """Return the newest API version that both sides support, e.g. 38 for v0.0.38. Raises :class:`SlurmError`."""
        with self._lock:
            if not self._version:
                self._version = self._discover()
            return self._version

    def _discover(self) -> int:
        offered: set[int] = set()
        for path in ("/openapi/v3", "/openapi"):
            status, content = self._query("openapi", "GET", path)
            if status == 200:
                offered |= {int(number) for number in _VERSION.findall(content)}
                break
        known = [number for number in offered if format.OLDEST <= number <= format.NEWEST]
        if known:
            return max(known)
        if not offered:
            raise SlurmError("slurmrestd: it offers no version of its API; is the address right?")
        listed = ", ".join(f"v0.0.{number}" for number in sorted(offered))
        raise SlurmError(
            f"slurmrestd: it offers {listed}, this bridge supports v0.0.{format.OLDEST} to v0.0.{format.NEWEST}"
        )

    def _accounting(self) -> str:
        """Return "slurmdbd" if this slurmrestd has access to it, else an empty string: then it has no such path."""
        query = urllib.parse.urlencode({"job_name": self._prefix, "users": self._user, "start_time": int(time.time())})
        status, content = self._query("describe", "GET", f"/slurmdb/v0.0.{self.version()}/jobs?{query}")
        if status == 404:
            return ""
        # slurmdbd exists, even if it fails at the moment.
        _answer("describe", status, content, frozenset())
        return "slurmdbd"

    def _ask(
        self, what: str, part: str, path: str, *, method: str = "GET", accept: frozenset[int] = frozenset()
    ) -> Mapping[str, Any]:
        """Send an idempotent request and return the answer. Raises :class:`SlurmError`."""
        status, content = self._query(what, method, f"/{part}/v0.0.{self.version()}/{path}")
        if status == 404 and what == "jobs":
            # slurmrestd was upgraded: query its versions again.
            self._version = 0
        return _answer(what, status, content, accept)

    def _query(self, what: str, method: str, path: str) -> tuple[int, bytes]:
        """Send a request, and send it again if a new token may help."""
        for last in (False, True):
            token = self._token.get()
            try:
                status, content = self._exchange(what, method, path, token, None)
            except (NotSentError, BrokenError) as error:
                raise SlurmError(f"slurmrestd: {error}") from None
            if last or not _perhaps_token(status, content) or not self._token.invalidate(token):
                break
        return status, content

    def _exchange(self, what: str, method: str, path: str, token: str, body: bytes | None) -> tuple[int, bytes]:
        began = time.monotonic()
        good = False
        headers = {"X-SLURM-USER-NAME": self._user, "X-SLURM-USER-TOKEN": token, "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            status, content = exchange(
                self._endpoint, method, path, headers=headers, body=body, timeout=self._timeout, limit=_MAX_ANSWER,
                ca_file=self._ca_file,
            )  # fmt: skip
            good = status < 400
            return status, content
        finally:
            self._observer(f"slurmrestd {what}", time.monotonic() - began, good)


def submitted(status: int, content: bytes) -> int:
    """Return the job id in slurmrestd's answer. Raises :class:`SubmissionRefused` or :class:`SubmissionAmbiguous`."""
    answer = _json(content)
    if answer is None:
        raise SubmissionAmbiguous(f"slurmrestd answered HTTP {status}: {_excerpt(content)}")
    reported = format.errors(answer)
    job = answer.get("job_id")
    if status == 200 and type(job) is int and job > 0:
        # An accepted job may come with a warning, for instance that its nodes are down at the moment.
        return job
    # Some versions list a cause first, and its number last.
    numbers = [number for number, _ in reported if number > 0]
    # Errors without a number are messages of the site.
    judgement = submission_errors.of_slurm(
        [text for number, text in reported if number > 0], [text for number, text in reported if number <= 0]
    )
    clear = bool(numbers) and all(any(number in series for series in _REFUSED) for number in numbers)
    if status < 400 or not clear or judgement.sent is not submission_errors.Sent.REFUSED:
        raise SubmissionAmbiguous(f"slurmrestd answered HTTP {status}: {judgement.reason or _excerpt(content)}")
    raise SubmissionRefused(f"Slurm refused: {judgement.reason}", judgement.patience)


def _answer(what: str, status: int, content: bytes, accept: frozenset[int]) -> Mapping[str, Any]:
    answer = _json(content)
    if answer is None:
        raise SlurmError(f"slurmrestd: {what}: HTTP {status}: {_excerpt(content)}")
    reported = format.errors(answer)
    if serious := [words for number, words in reported if number not in accept]:
        raise SlurmError(f"slurmrestd: {what}: {serious[0]}")
    if status >= 400 and not reported:
        raise SlurmError(f"slurmrestd: {what}: HTTP {status}")
    return answer


def _perhaps_token(status: int, content: bytes) -> bool:
    if status < 400:
        return False
    answer = _json(content)
    numbers = {number for number, _ in format.errors(answer)} if answer is not None else set()
    return status in (401, 403) or bool(numbers & _PERHAPS_TOKEN)


def _json(content: bytes) -> Mapping[str, Any] | None:
    try:
        answer = json.loads(content)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _excerpt(content: bytes) -> str:
    return " ".join(content[:300].decode("utf-8", "replace").split())[:200] or "nothing"
