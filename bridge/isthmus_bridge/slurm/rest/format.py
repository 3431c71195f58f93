"""Requests to slurmrestd and a strict parser of its answers, for its API from v0.0.36 on. Without side effects.

Before v0.0.40 numbers are plain numbers and a state is a string; since then a number may be an object that says whether
it is set, and a state is a list of a base state and flags. A malformed answer raises an error: an incomplete answer
must not look like the absence of a job.
"""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from isthmus_contracts.slurm_states import normal

from ..model import Gres, SlurmError, Submission, TaskRecord
from ..options import Options
from ..parse import expand

OLDEST, NEWEST = 36, 45
TYPED = 40
# Of a job's state and flags, squeue shows the first of these flags; else the base state, which comes first.
SHOWN_FLAGS = (
    "COMPLETING", "STAGE_OUT", "CONFIGURING", "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
    "EXPEDITING", "STOPPED", "REVOKED", "RESV_DEL_HOLD", "SIGNALING", "LAUNCH_FAILED", "RECONFIG_FAIL",
)  # fmt: skip
# Flags of slurmrestd that squeue never shows: the job's base state, or another flag, says more.
HIDDEN_FLAGS = frozenset({"POWER_UP_NODE", "UPDATE_DB"})
_NOTHING = frozenset({"", "None", "(null)", "None assigned"})


def submission(version: int, wanted: Submission, script: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the body of a submission."""
    minutes = -(-wanted.time_limit_seconds // 60)
    array = f"0-{wanted.tasks - 1}" + (f"%{wanted.at_once}" if wanted.at_once else "")
    job: dict[str, Any] = {
        "name": wanted.name,
        "array": array,
        "comment": wanted.comment,
        "current_working_directory": str(wanted.directory),
        "standard_output": wanted.output,
        "standard_input": "/dev/null",
        "requeue": True,
        "tasks": wanted.steps,
        "cpus_per_task": wanted.cpus_per_task,
    }
    if wanted.partition:
        job["partition"] = wanted.partition
    if wanted.account:
        job["account"] = wanted.account
    if wanted.qos:
        job["qos"] = wanted.qos
    if version < TYPED:
        job |= {
            "nodes": [1, 1],
            "time_limit": minutes,
            "open_mode": "append",
            "environment": dict(environment),
        }
        job |= _words(wanted)
        return {"script": _warned(wanted, minutes * 60), "job": job}
    job |= {
        "minimum_nodes": 1,
        "maximum_nodes": 1,
        "time_limit": _set(minutes),
        "open_mode": ["APPEND"],
        "environment": [f"{name}={value}" for name, value in environment.items()],
        "kill_warning_signal": "TERM",
        "kill_warning_delay": _set(wanted.warning_seconds),
    }
    if wanted.steps == 1:
        job["kill_warning_flags"] = ["BATCH_JOB"]
    return {"script": script, "job": job | _typed(wanted)}


def _words(wanted: Submission) -> dict[str, Any]:
    """Return memory, generic resources and the site's options for versions before v0.0.40, named like sbatch's
    options."""
    job: dict[str, Any] = {}
    how, memory = wanted.memory
    if how != "none":
        job[f"memory_{how.replace('-', '_')}"] = memory
    if wanted.plain_gres:
        job["gres"] = ",".join(gres.words() for gres in wanted.plain_gres)
    asked, gpus = wanted.gpus
    if asked != "gres" and gpus:
        name = {"per-task": "gpus_per_task", "per-node": "gpus_per_node", "per-job": "gpus"}[asked]
        job[name] = ",".join(gres.words(named=False) for gres in gpus)
    if exclusive := wanted.options.exclusive:
        # The schema says "true", but Slurm 22.05 accepts only this word.
        job["exclusive"] = "exclusive" if exclusive == "yes" else exclusive
    return job | _plain(wanted.options)


def _typed(wanted: Submission) -> dict[str, Any]:
    """Return the same fields for versions since v0.0.40, named as in Slurm's own messages."""
    job: dict[str, Any] = {}
    how, memory = wanted.memory
    if how == "per-gpu":
        job["memory_per_tres"] = f"gres/gpu:{memory}"
    elif how != "none":
        job[f"memory_{how.replace('-', '_')}"] = _set(memory)
    tres: dict[str, list[Gres]] = {"tres_per_node": list(wanted.plain_gres)}
    asked, gpus = wanted.gpus
    if asked != "gres":
        tres.setdefault(f"tres_{asked.replace('-', '_')}", []).extend(gpus)
    for name, several in tres.items():
        if several:
            job[name] = ",".join(f"gres/{gres.words()}" for gres in several)
    if exclusive := wanted.options.exclusive:
        job["shared"] = ["none" if exclusive == "yes" else exclusive]
    return job | _plain(wanted.options)


def _plain(options: Options) -> dict[str, Any]:
    """Return the site's options that have the same names in all versions."""
    job = {
        "constraints": options.constraint,
        "reservation": options.reservation,
        "wckey": options.wckey,
        "licenses": options.licenses,
        "nice": options.nice,
        "threads_per_core": options.threads_per_core,
    }
    return {name: value for name, value in job.items() if value}


def _warned(wanted: Submission, limit: int) -> str:
    """Return a script that warns itself, since these versions refuse sbatch's `B:` before the signal.

    `exec` keeps the process, so the real script gets the signal; if it starts tasks, these get it.
    """
    wait = max(1, limit - wanted.warning_seconds)
    warn = 'kill -TERM "$$"' if wanted.steps == 1 else 'scancel --signal=TERM "$SLURM_JOB_ID"'
    return (
        "#!/bin/bash\n"
        f"{{ sleep {wait} && {warn}; }} </dev/null >/dev/null 2>&1 &\n"
        f"exec /bin/bash {shlex.quote(str(wanted.script))}\n"
    )


def _set(number: int) -> dict[str, Any]:
    return {"set": True, "infinite": False, "number": number}


def jobs(content: Mapping[str, Any], uid: int) -> list[TaskRecord]:
    """Return this user's jobs from an answer of /slurm/…/jobs. Raises :class:`SlurmError`."""
    records = []
    for job in _listed(content):
        if _number(job, "user_id") != uid:
            continue
        state = state_of(job.get("job_state"))
        code, signal = _exit(job.get("exit_code"))
        own = _number(job, "job_id")
        task = _optional(job.get("array_task_id"))
        records.append(
            TaskRecord(
                job_id=own,
                # 0 if the job is not an array.
                array_id=_number(job, "array_job_id") or own,
                name=_text(job, "name"),
                indices=_indices(job, task),
                state=state,
                reason=_word(job.get("state_reason")),
                exit_code=code,
                signal=signal,
                restarts=_number(job, "restart_cnt"),
                start=float(_number(job, "start_time")),
                submitted=float(_number(job, "submit_time")),
                node=_word(job.get("nodes")),
                ends=float(_number(job, "end_time")) if state == "RUNNING" else 0.0,
                directory=_word(job.get("current_working_directory")),
            )
        )
    return records


def history(content: Mapping[str, Any], names: frozenset[str], user: str) -> list[TaskRecord]:
    """Return this user's jobs with these names from an answer of /slurmdb/…/jobs. Raises :class:`SlurmError`."""
    records = []
    for job in _listed(content):
        name = _text(job, "name")
        if name not in names or _text(job, "user") != user:
            continue
        array, state, time = (_object(job, key) for key in ("array", "state", "time"))
        own = _number(job, "job_id")
        task = _optional(array.get("task_id"))
        several = array.get("task")
        code, signal = _exit(job.get("exit_code"))
        records.append(
            TaskRecord(
                job_id=own,
                array_id=_number(array, "job_id") or own,
                name=name,
                indices=(task,) if task is not None else _expanded(several),
                state=state_of(state.get("current")),
                reason=_word(state.get("reason")),
                exit_code=code,
                signal=signal,
                start=float(_number(time, "start")),
                submitted=float(_number(time, "submission")),
                node=_word(job.get("nodes")),
            )
        )
    return records


def owners(content: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return name and owner of each record of /slurm/…/job/ID. Raises :class:`SlurmError`."""
    return [(_text(job, "name"), _number(job, "user_id")) for job in _listed(content)]


def partitions(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the partitions. Raises :class:`SlurmError`."""
    return [_text(each, "name") for each in _listed(content, "partitions")]


def about(content: Mapping[str, Any]) -> tuple[str, str]:
    """Return Slurm's version and the cluster's name; empty strings if the answer does not hold them."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    slurm = meta.get("slurm") or meta.get("Slurm")
    slurm = slurm if isinstance(slurm, dict) else {}
    return str(slurm.get("release") or ""), str(slurm.get("cluster") or "")


def errors(content: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return number and message of each error in an answer."""
    found = content.get("errors")
    if not isinstance(found, list):
        return []
    listed = []
    for item in found:
        if not isinstance(item, dict):
            return [(-1, "malformed error")]
        number = item.get("error_number", item.get("error_code", -1))
        words = item.get("error") or item.get("description") or "no reason given"
        if item.get("description") and number in (-1, 0):
            words = item["description"]
        listed.append((number if isinstance(number, int) else -1, " ".join(str(words).split())[:400]))
    return listed


def state_of(value: Any) -> str:
    """Return a state as squeue would show it. Raises :class:`SlurmError`."""
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str) and word for word in words):
        raise SlurmError(f"slurmrestd: {str(value)[:80]!r} is not a state of a job")
    base = next((word for word in words if word not in HIDDEN_FLAGS), words[0])
    return normal(next((flag for flag in SHOWN_FLAGS if flag in words), base))


def _listed(content: Mapping[str, Any], key: str = "jobs") -> Iterable[Mapping[str, Any]]:
    items = content.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SlurmError(f"slurmrestd: the answer has no list of {key}")
    return items


def _indices(job: Mapping[str, Any], task: int | None) -> tuple[int, ...] | None:
    if task is not None and not job.get("array_task_string") and _number(job, "array_job_id"):
        return (task,)
    return _expanded(job.get("array_task_string"))


def _expanded(text: Any) -> tuple[int, ...] | None:
    # slurmrestd truncates long lists unless its environment has SLURM_BITSTR_LEN=0: then the indices are unknown.
    if not isinstance(text, str) or not text or "..." in text:
        return None
    return expand(text)


def _exit(value: Any) -> tuple[int, int]:
    """Return exit code and signal, from a wait status or from an object that holds both."""
    if isinstance(value, dict) and "return_code" in value:
        signal = value.get("signal")
        number = signal.get("id", signal.get("signal_id")) if isinstance(signal, dict) else None
        return _optional(value["return_code"]) or 0, _optional(number) or 0
    status = _optional(value) or 0
    return (status >> 8) & 0xFF, status & 0x7F


def _optional(value: Any) -> int | None:
    if isinstance(value, dict):
        value = value.get("number") if value.get("set") and not value.get("infinite") else None
    if value is None:
        return None
    if type(value) is not int:
        raise SlurmError(f"slurmrestd: {str(value)[:40]!r} is not a number")
    return value


def _number(record: Mapping[str, Any], key: str) -> int:
    if key not in record:
        raise SlurmError(f"slurmrestd: a record has no {key}")
    return _optional(record[key]) or 0


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise SlurmError(f"slurmrestd: a record has no {key}")
    return value


def _object(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    if not isinstance(value, dict):
        raise SlurmError(f"slurmrestd: a record has no {key}")
    return value


def _word(value: Any) -> str:
    return "" if not isinstance(value, str) or value in _NOTHING else value
