"""Clients that share a Slurm job. Pure functions.

Slurm reports on jobs, and the clients' own markers on their ends. An :class:`~.observation.Observation` keeps both;
:func:`by_client` converts job observations to per-client ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.slurm_states import Meaning

from ..clients_per_job import per_job
from ..files.run_directory import Exit, TaskMarker
from .observation import ClientNote, Observation, TaskObservation

_ENDED = ("COMPLETED", "FAILED")


def by_client(observation: Observation, spec: pb.PoolSpec) -> Observation:
    """Return the observation with clients instead of jobs as its tasks."""
    if per_job(spec) == 1:
        if all(index < spec.replicas for index in observation.tasks):
            return observation
        # The pool was shrunk, and tasks to be cancelled are still listed.
        return replace(observation, tasks={i: task for i, task in observation.tasks.items() if i < spec.replicas})
    tasks = {
        client: _client(job, observation.clients.get(client))
        for index, job in observation.tasks.items()
        for client in _clients_of(index, spec)
    }
    return replace(observation, tasks=tasks, clients={})


def without_exit(observation: Observation, spec: pb.PoolSpec) -> set[int]:
    """Return the clients that have started and whose end is not noted."""
    return {
        client
        for index, job in observation.tasks.items()
        if job.meaning is not Meaning.WAITING
        for client in _clients_of(index, spec)
        if (note := observation.clients.get(client)) is None or note.exit_code is None or note.restarts < job.restarts
    }


def with_exits(observation: Observation, array_id: int, exits: Mapping[int, Exit]) -> Observation:
    """Return the observation with the ends of clients, from their own markers."""
    fresh = {
        client: ClientNote(ended.restarts, ended.code)
        for client, ended in exits.items()
        if ended.array_id == array_id and _newer(ended, observation.clients.get(client))
    }
    return replace(observation, clients={**observation.clients, **fresh}) if fresh else observation


def with_tails(observation: Observation, spec: pb.PoolSpec, tails: Mapping[int, str]) -> Observation:
    """Return the observation with the last lines of clients that failed."""
    notes = dict(observation.clients)
    for client, tail in tails.items():
        job = observation.tasks[client // per_job(spec)]
        note = _current(job, notes.get(client)) or ClientNote(job.restarts)
        notes[client] = replace(note, tail=tail)
    return replace(observation, clients=notes)


def markers_of_jobs(marks: Mapping[int, TaskMarker], spec: pb.PoolSpec) -> dict[int, TaskMarker]:
    """Combine the markers of clients to those of their jobs: a job has ended when all of its clients have."""
    found: dict[int, TaskMarker] = {}
    for index in sorted({client // per_job(spec) for client in marks}):
        members = [marks.get(client) for client in _clients_of(index, spec)]
        there = [mark for mark in members if mark is not None]
        if not there:
            continue
        newest = max(there, key=lambda mark: mark.array_id)
        codes = [mark.exit_code for mark in there if mark.array_id == newest.array_id and mark.exit_code is not None]
        found[index] = replace(newest, exit_code=max(codes) if len(codes) == len(members) else None)
    return found


def _clients_of(job: int, spec: pb.PoolSpec) -> Iterable[int]:
    share = per_job(spec)
    return range(job * share, min((job + 1) * share, spec.replicas))


def _current(job: TaskObservation, note: ClientNote | None) -> ClientNote | None:
    """Return the note, or ``None`` if it is about a start before the job's last one."""
    return note if note is not None and note.restarts >= job.restarts else None


def _newer(ended: Exit, note: ClientNote | None) -> bool:
    return note is None or note.exit_code is None or ended.restarts > note.restarts


def _client(job: TaskObservation, note: ClientNote | None) -> TaskObservation:
    note = _current(job, note)
    if note is None or job.meaning is Meaning.WAITING:
        return job
    tail = note.tail or job.tail
    if note.exit_code is None:
        return replace(job, tail=tail)
    if note.exit_code == 0:
        return replace(job, state="COMPLETED", reason="", exit_code=0, signal=0, tail="")
    if job.meaning.over and job.state not in _ENDED:
        # The cause that ended the job (time limit, node failure) says more than the exit code of the client.
        return replace(job, exit_code=note.exit_code, signal=0, tail=tail)
    return replace(job, state="FAILED", reason="NonZeroExitCode", exit_code=note.exit_code, signal=0, tail=tail)
