"""Process that replaces the cluster's add-ons: DNS and the volume provisioner (`python -m lab services`)."""

from __future__ import annotations

import threading

from lab.kubernetes import dns
from lab.kubernetes.api import Api
from lab.kubernetes.storage import Provisioner
from lab.machine.errors import say
from lab.machine.network import NODE_ADDRESS
from lab.machine.paths import Paths


def serve(paths: Paths) -> None:
    """Serve until ended. Runs inside the lab's network."""
    api = Api(paths.kubeconfig)
    dns.serve(api, NODE_ADDRESS)
    provisioner = Provisioner(api, paths.volumes)
    threading.Thread(target=provisioner.reclaim, daemon=True).start()
    say("DNS and provisioner are serving")
    provisioner.provision()
