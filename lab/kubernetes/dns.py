"""DNS of the lab: Service names from a watch on the API; other names do not exist."""

from __future__ import annotations

import threading
from typing import Any

from dnslib import CNAME, QTYPE, RCODE, RR, SRV, A, DNSRecord
from dnslib.server import BaseResolver, DNSLogger, DNSServer

from lab.kubernetes.api import Api, Object, follow
from lab.kubernetes.config import CLUSTER_DOMAIN

TTL = 2
PORT = 53


class Zone:
    """DNS records by name, from Services and Endpoints."""

    def __init__(self) -> None:
        self._services: dict[tuple[str, str], Object] = {}
        self._endpoints: dict[tuple[str, str], Object] = {}
        self._lock = threading.Lock()
        self.addresses: dict[str, list[str]] = {}
        self.aliases: dict[str, str] = {}
        self.ports: dict[str, list[tuple[int, str]]] = {}

    def set_services(self, services: dict[tuple[str, str], Object]) -> None:
        with self._lock:
            self._services = dict(services)
            self._rebuild()

    def set_endpoints(self, endpoints: dict[tuple[str, str], Object]) -> None:
        with self._lock:
            self._endpoints = dict(endpoints)
            self._rebuild()

    def _rebuild(self) -> None:
        addresses: dict[str, list[str]] = {}
        aliases: dict[str, str] = {}
        ports: dict[str, list[tuple[int, str]]] = {}
        for (namespace, name), service in self._services.items():
            spec = service["spec"]
            full = f"{name}.{namespace}.svc.{CLUSTER_DOMAIN}"
            if spec.get("type") == "ExternalName":
                aliases[full] = spec["externalName"]
            elif spec.get("clusterIP") == "None":
                addresses[full] = []
                for host, address in self._members(namespace, name, spec):
                    addresses[full].append(address)
                    if host:
                        addresses.setdefault(f"{host}.{full}", []).append(address)
            else:
                addresses[full] = [spec["clusterIP"]]
            for port in spec.get("ports", ()):
                if port.get("name"):
                    ports[f"_{port['name']}._{port['protocol'].lower()}.{full}"] = [(port["port"], full)]
        # Replaced whole, so that a query sees the old names or the new ones.
        self.addresses, self.aliases, self.ports = addresses, aliases, ports

    def _members(self, namespace: str, name: str, spec: Object) -> list[tuple[str, str]]:
        """Yield hostname and address of the pods behind a headless Service."""
        found = []
        for subset in self._endpoints.get((namespace, name), {}).get("subsets") or ():
            ready = subset.get("addresses") or []
            waiting = subset.get("notReadyAddresses") or [] if spec.get("publishNotReadyAddresses") else []
            found += [(entry.get("hostname", ""), entry["ip"]) for entry in ready + waiting]
        return found


class Resolver(BaseResolver):  # type: ignore[misc]
    """Resolver that answers from a zone."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone

    def resolve(self, request: Any, handler: Any) -> Any:
        reply: DNSRecord = request.reply()
        name = str(request.q.qname).rstrip(".").lower()
        kind = QTYPE[request.q.qtype]
        if name in self._zone.aliases:
            reply.add_answer(RR(request.q.qname, QTYPE.CNAME, rdata=CNAME(self._zone.aliases[name]), ttl=TTL))
        elif name in self._zone.addresses:
            # For a known name and another record type (mostly AAAA), the answer is empty; the name still exists.
            if kind in ("A", "ANY"):
                for address in self._zone.addresses[name]:
                    reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=TTL))
        elif name in self._zone.ports:
            if kind in ("SRV", "ANY"):
                for port, target in self._zone.ports[name]:
                    reply.add_answer(RR(request.q.qname, QTYPE.SRV, rdata=SRV(0, 100, port, target), ttl=TTL))
        else:
            reply.header.rcode = RCODE.NXDOMAIN
        return reply


def serve(api: Api, address: str) -> None:
    """Start the server and the watch in threads."""
    zone = Zone()
    for tcp in (False, True):
        quiet = DNSLogger(log="error", prefix=False)
        DNSServer(Resolver(zone), address=address, port=PORT, tcp=tcp, logger=quiet).start_thread()
    for path, update in (("/api/v1/services", zone.set_services), ("/api/v1/endpoints", zone.set_endpoints)):
        threading.Thread(target=follow, args=(api, path, update), daemon=True).start()
