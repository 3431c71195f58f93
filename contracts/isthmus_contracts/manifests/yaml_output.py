"""YAML that Kubernetes reads with the same meaning."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

# PyYAML implements YAML 1.1, where a number with an exponent has a point. In Kubernetes' YAML 1.2 it needs none.
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings that would be read as numbers."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _NUMBER.fullmatch(text) else None)


_Dumper.add_representer(str, _text)


def dumped(objects: Iterable[Any]) -> str:
    """Return the objects as YAML documents, with their keys in the given order."""
    return str(yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120))
