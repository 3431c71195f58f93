"""Definitions shared by all parts of Isthmus: custom resources, wire protocols, names and identities."""

from importlib.metadata import version

__version__ = version("isthmus-contracts")
