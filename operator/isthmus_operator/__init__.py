"""The operator: reconciles FederatedJobs and HPCSites."""

from importlib.metadata import version

__version__ = version("isthmus-operator")
