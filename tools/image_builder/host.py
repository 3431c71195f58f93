"""Files of the host that a build uses read-only and does not keep: certificates, pip's configuration, wheels."""

from __future__ import annotations

import configparser
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.image_builder.common import output_of, say

CA_VARIABLES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# Settings passed to the image's pip; the others concern the host.
FORWARDED = (
    "index-url",
    "extra-index-url",
    "trusted-host",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
    "find-links",
)


@dataclass(frozen=True)
class Borrowed:
    """Files and a folder that are mounted into the build."""

    pip_conf: Path | None = None
    ca_bundle: Path | None = None
    wheels: Path | None = None


def borrow(scratch: Path) -> Borrowed:
    """Read pip's configuration (files and PIP_* variables) as the pip of this machine sees it."""
    settings = pip_settings()
    directories: list[Path] = []
    forwarded: dict[str, str] = {}
    for key, value in settings.items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if not path.is_absolute():
                words.append(word)
            elif key == "find-links" and path.is_dir():
                directories.append(path)
        if key in FORWARDED and words:
            forwarded[key.removeprefix("default-")] = " ".join(words)

    pip_conf = None
    if forwarded:
        pip_conf = scratch / "pip.conf"
        pip_conf.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in forwarded.items()))
        pip_conf.chmod(0o600)  # the URL of an index may contain a password
    if len(directories) > 1:
        say(f"pip is configured with {len(directories)} wheel directories; the build sees the first, {directories[0]}")
    return Borrowed(pip_conf, _ca_bundle(settings.get("cert")), directories[0] if directories else None)


def pip_settings() -> dict[str, str]:
    """Return the settings of `pip install` by name; later sources override earlier ones, as in pip."""
    listed = output_of([sys.executable, "-m", "pip", "config", "list"])
    settings: dict[str, str] = {}
    if listed is not None:
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(("global.", "install.", ":env:.")):
                settings[name.rpartition(".")[2]] = value.strip("'\"").replace("\\n", " ")
        return settings
    # Without pip in this Python, read the files directly.
    parser = configparser.ConfigParser(interpolation=None)
    parser.read([os.environ.get("PIP_CONFIG_FILE", ""), "/etc/pip.conf", Path.home() / ".config/pip/pip.conf"])
    for section in ("global", "install"):
        if parser.has_section(section):
            settings.update(parser.items(section))
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            settings[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return settings


def _ca_bundle(configured: str | None) -> Path | None:
    """Return the bundle configured on this machine; without one, the base image uses its own."""
    for name in (configured, *(os.environ.get(variable) for variable in CA_VARIABLES)):
        if name and Path(name).is_file():
            return Path(name)
    return None
