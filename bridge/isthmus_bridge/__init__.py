"""The bridge: a service at an HPC site that takes declarative requests over mutual TLS, and runs jobs in Slurm."""

from importlib.metadata import version

__version__ = version("isthmus-bridge")
