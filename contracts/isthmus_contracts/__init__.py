"""What the parts of Isthmus agree on: custom resources, wire protocols, names and identities."""

from importlib.metadata import version

__version__ = version("isthmus-contracts")
