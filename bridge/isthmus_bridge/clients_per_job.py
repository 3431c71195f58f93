"""Numbers of clients and Slurm jobs: how many clients share a job, and how many jobs a pool takes."""

from isthmus_contracts.pb import bridge_pb2 as pb


def per_job(spec: pb.PoolSpec) -> int:
    """Return how many clients share a job."""
    return max(1, spec.clients_per_job)


def jobs_for(spec: pb.PoolSpec) -> int:
    """Return how many jobs a pool's clients take."""
    return -(-spec.replicas // per_job(spec))
