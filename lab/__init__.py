"""Lab: real Kubernetes and real Slurm on one Debian machine, for demonstrations and end-to-end tests.

From a shell, in the repository's root, as root::

    python -m lab up                  # Kubernetes and Slurm, about half a minute once installed
    python -m lab exec -- kubectl get nodes
    python -m lab down                # keeps only the cache

From Python, `Lab` is the whole public interface::

    lab = Lab()                       # or Lab("/some/directory"); starts nothing
    lab.up()                          # or lab.up(["slurm"]); does nothing if it runs
    lab.run(["kubectl", "get", "nodes"], check=True)
    lab.run(["sbatch", "job.sh"], user=lab.user, cwd=lab.home, check=True)
    lab.user_python()                 # a Python with the caller's packages that lab.user can run
    lab.env()                         # KUBECONFIG, SLURM_CONF, PATH, … for another process
    lab.command(argv, user=None)      # the command line that subprocess.Popen needs to run argv inside
    lab.stop_slurm_daemon("slurmctld", kill=True)    # and lab.start_slurm_daemon(…): faults for tests
    lab.kubeconfig, lab.slurm_conf, lab.node_address, lab.netns, lab.user, lab.home

Everything runs in one network namespace without a route out. A test process started by
`python -m lab exec` reaches the API server, every Service and every pod directly.
"""

from lab.cluster import KUBERNETES, PARTS, SLURM, Lab
from lab.machine.errors import LabError

__all__ = ["KUBERNETES", "PARTS", "SLURM", "Lab", "LabError"]
