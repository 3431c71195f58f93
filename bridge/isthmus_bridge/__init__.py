"""The bridge: runs at an HPC site, takes declarative requests over mutual TLS, and speaks Slurm."""

from importlib.metadata import version

__version__ = version("isthmus-bridge")
