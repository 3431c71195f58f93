"""A job's stored record, recovered from the status if its annotation is damaged."""

from .job_record import ArrayKey, ArrayRecord, ArrayState, Record, Submission
from .observed import Job


def load_record(job: Job) -> Record:
    """Return the job's record. If the annotation is damaged, recover the attempts of HPC pools from the status."""
    try:
        return Record.load(job.record, job.uid)
    except ValueError:
        record = Record(damaged=True)
        wanted = {pool.get("name"): pool for pool in job.spec.get("pools") or ()}
        for pool in job.status.get("pools") or ():
            manifest = wanted.get(pool.get("name")) or {}
            site = ((manifest.get("hpc") or {}).get("siteRef") or {}).get("name")
            if site:
                # Its CA is unknown, so the attempt is cancelled, and the next one gets a number of its own.
                record.hpc[ArrayKey(pool["name"])] = ArrayRecord(
                    site,
                    attempt=int(pool.get("attempt", 0)),
                    size=int(manifest.get("replicas") or 1),
                    state=ArrayState.ACCEPTED,
                    submission=Submission(authority="lost"),
                )
        return record
