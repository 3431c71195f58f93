"""Requests to a site's bridge."""

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec, Pool
from isthmus_contracts.pb import bridge_pb2
from isthmus_contracts.wire.addresses import joined

from ..state.job_record import ArrayRecord
from ..state.observed import Job, Observed

# Constant: the arrays of a pool differ by their attempt numbers.
GENERATION = 1


def key(cluster: str, job: Job, pool: str, attempt: int) -> str:
    """Return the exactly-once key of one attempt of a pool's array."""
    return ids.pool_key(cluster, job.uid, pool, GENERATION, attempt)


def endpoint(spec: FederatedJobSpec, observed: Observed) -> str:
    """Return the address that HPC clients connect to; empty while it is unknown."""
    expose, service = spec.aggregator.expose, observed.service
    if expose.address is not None:
        return expose.address
    if service is None:
        return ""
    if expose.type == "NodePort":
        return _host_port(observed.node_address, service.node_port)
    if expose.type == "LoadBalancer":
        return _host_port(service.ingress, ids.AGGREGATOR_PORT)
    return _host_port(service.cluster_ip, ids.AGGREGATOR_PORT)


def pool_spec(
    job: Job, spec: FederatedJobSpec, pool: Pool, array: ArrayRecord, address: str, via_bridge: bool
) -> bridge_pb2.PoolSpec:
    """Return the request for one attempt of an array, without its certificate and files."""
    hpc = pool.hpc
    assert hpc is not None
    return bridge_pb2.PoolSpec(
        job_uid=job.uid,
        namespace=job.namespace,
        job=job.name,
        pool=pool.name,
        attempt=array.attempt,
        replicas=array.size,
        first_index=array.first,
        pool_size=pool.size if pool.size != array.size else 0,
        max_queue_seconds=hpc.max_queue_seconds,
        first_client=spec.first_client(pool.name) + array.first,
        total_clients=spec.clients_beside(pool.name),
        partition=hpc.partition or "",
        account=hpc.account or "",
        qos=hpc.qos or "",
        time_limit_seconds=hpc.time_limit_seconds,
        cpus_per_task=hpc.resources.cpus_per_task,
        memory_mib=hpc.resources.memory_mib,
        gres=[
            bridge_pb2.GenericResource(name=item.name, type=item.type or "", count=item.count)
            for item in hpc.resources.gres
        ],
        # Left unset at its default, so that a bridge that does not know the field accepts the request.
        clients_per_job=min(hpc.clients_per_job, array.size) if hpc.clients_per_job > 1 else 0,
        environment=hpc.environment,
        data_ref=hpc.data_ref or "",
        image=spec.task.image,
        command=list(spec.task.command),
        env={item.name: item.value for item in spec.task.env},
        privacy=_privacy(spec),
        federation=bridge_pb2.Federation(
            endpoint=address, server_name=ids.aggregator_server_name(job.uid), via_bridge=via_bridge
        ),
    )


def _privacy(spec: FederatedJobSpec) -> bridge_pb2.Privacy | None:
    """Return the protection that the manifest asks for; None, as for bridges that do not know the field, without any.

    Keys and roots are not part of it: the site's clients get theirs from the bridge.
    """
    secure, private = spec.privacy.secure_aggregation, spec.privacy.differential_privacy
    if secure is None and private is None:
        return None
    stated = bridge_pb2.Privacy()
    if secure is not None:
        stated.secure_aggregation = True
        stated.min_parties, stated.min_clients = secure.min_parties, secure.min_clients
    if private is not None:
        stated.clip_norm, stated.noise_multiplier = float(private.clip_norm), float(private.noise_multiplier)
        stated.delta, stated.max_epsilon = float(private.delta), float(private.max_epsilon or 0)
        stated.distributed_noise = private.distributed
    return stated


def _host_port(host: str, port: int) -> str:
    if not host or not port:
        return ""
    return joined(host, port)
