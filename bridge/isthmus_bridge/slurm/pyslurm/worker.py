"""Standalone program that sends one request to Slurm through pyslurm. Needs only the standard library and pyslurm.

Run as ``python -I worker.py REQUEST``, with REQUEST in JSON; the answer is one JSON object on standard output:
``{"result": …}``, ``{"refused": …}`` (pyslurm is unusable, nothing was sent) or ``{"error": [number, message]}``.
libslurm ends the process if its configuration is invalid, and may block for any time. A separate process protects the
bridge from both, and keeps pyslurm's licence (GPL-2.0) out of it.
"""

import datetime
import json
import os
import sys
from typing import Any

# Keep pyslurm from loading a configuration when it is imported: without one, libslurm ends the process.
os.environ["PYSLURM_DISABLE_AUTO_INIT"] = "1"


def main(text: str) -> None:
    """Answer one request."""
    try:
        import pyslurm
    except Exception as error:
        _say({"refused": f"cannot import pyslurm: {type(error).__name__}: {error}"})
        return
    request = json.loads(text)
    pyslurm.slurm_init(os.environ.get("SLURM_CONF"))
    actions = {
        "submit": _submit, "jobs": _jobs, "cancel": _cancel, "describe": _describe, "partitions": _partitions,
    }  # fmt: skip
    try:
        result = actions[request["do"]](pyslurm, request)
    except pyslurm.RPCError as error:
        _say({"error": [error.errno, error.msg]})
    else:
        _say({"result": result})


def _submit(pyslurm: Any, request: dict[str, Any]) -> int:
    return int(pyslurm.JobSubmitDescription(**request["job"]).submit())


def _jobs(pyslurm: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    found = pyslurm.Jobs.load().values()
    return [
        {
            "id": job.id,
            "array": job.array_id or 0,
            "task": job.array_task_id,
            "waiting": job.array_tasks_waiting,
            "name": job.name or "",
            "state": job.state,
            "reason": job.state_reason or "",
            "exit_code": job.exit_code or 0,
            "signal": job.exit_code_signal or 0,
            "restarts": job.requeue_count or 0,
            "start": _seconds(job.start_time),
            "end": _seconds(job.end_time),
            "submitted": _seconds(job.submit_time),
            "node": job.allocated_nodes or "",
            "directory": job.working_directory or "",
        }
        for job in found
        if job.user_id == request["uid"]
    ]


def _cancel(pyslurm: Any, request: dict[str, Any]) -> bool:
    # Match name and owner too, since Slurm may reuse an id after a crash.
    mine = [
        job
        for job in pyslurm.Jobs.load().values()
        if request["array"] in (job.array_id, job.id) and job.name == request["name"] and job.user_id == request["uid"]
    ]
    if mine:
        pyslurm.Job(request["array"]).cancel()
    return bool(mine)


def _describe(pyslurm: Any, request: dict[str, Any]) -> dict[str, Any]:
    config = pyslurm.slurmctld.Config.load()
    return {"version": config.version, "cluster": config.cluster_name, "arrays": config.max_array_size or 0}


def _partitions(pyslurm: Any, request: dict[str, Any]) -> list[str]:
    return sorted(pyslurm.Partitions.load())


def _seconds(value: Any) -> float:
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else 0.0


def _say(answer: dict[str, Any]) -> None:
    json.dump(answer, sys.stdout)
    sys.stdout.flush()
    # Skip libslurm's clean-up, which may abort.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
