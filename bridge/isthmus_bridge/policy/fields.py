"""Types of values in a policy, with readable validation errors."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from ..slurm.rest.http import endpoint

# A path without blanks and characters that are special in sudoers: a command line of such paths matches only itself.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/@+-]*")
USER = "{user}"
# user:password@ may precede the host.
PROXY = re.compile(r"http://(?:[^\s/@]+@)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):(\d{1,5})/?")
_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):(\d{1,5})")


def _printable(text: str) -> str:
    if not text or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("must not be empty or hold control characters")
    return text


def absolute(path: Path) -> Path:
    text = str(path)
    # A colon separates the two sides of a container's bind mount; % and \\ are special in Slurm's patterns of log
    # files.
    if not path.is_absolute() or any(ord(c) < 32 or c in "%\\:" for c in text):
        raise ValueError(f"{text!r} must be an absolute path without %, \\, : and control characters")
    return path


def _host_port(text: str) -> str:
    match = _LISTEN.fullmatch(text)
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return text


def _proxy(text: str) -> str:
    match = PROXY.fullmatch(text)
    if match is None or int(match[2]) > 65535:
        # Do not quote the text: it may hold a password.
        raise ValueError("is not http://HOST:PORT, perhaps with USER:PASSWORD@ before the host")
    return text.rstrip("/")


def _user_name(text: str) -> str:
    if text == "root":
        raise ValueError("'root' is refused: jobs never run as root")
    return text


def of_each_user(path: Path) -> Path:
    text = str(path)
    if USER not in path.parts or text.count(USER) != 1 or PLAIN_PATH.fullmatch(text.replace(USER, "user")) is None:
        raise ValueError(f"{text!r} must be an absolute path with {USER} as one of its parts, of plain characters")
    return path


def rest_url(text: str) -> str:
    endpoint(text)
    return text


AbsolutePath = Annotated[Path, AfterValidator(absolute)]
Line = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]
Listen = Annotated[str, AfterValidator(_host_port)]
# A POSIX user name. It must not begin with a capital letter, as ALL and aliases in sudoers do, nor with -, #, % or a
# digit.
USER_NAME = re.compile(r"^[a-z_][A-Za-z0-9_.-]{0,31}$")
UserName = Annotated[str, Field(pattern=USER_NAME.pattern), AfterValidator(_user_name)]
ProxyUrl = Annotated[str, Field(max_length=1024), AfterValidator(_proxy)]
IdentityUri = Annotated[str, Field(max_length=512), AfterValidator(_printable)]
# YAML reads 1.50 as a number; an environment holds text.
Value = Annotated[str, Field(max_length=4096), BeforeValidator(lambda v: str(v) if type(v) in (int, float) else v)]
