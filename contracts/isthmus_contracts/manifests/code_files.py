"""Files of ``task.code``: names and sizes that cloud and HPC pools accept."""

import re
from collections.abc import Mapping

from ..api.fields import PATTERN_FILE_NAME

MAX_FILES = 64
# Maximum size of a ConfigMap, and well below that of a gRPC message.
MAX_BYTES = 1024 * 1024
_LONGEST_NAME = 128


def check_files(files: Mapping[str, bytes]) -> str:
    """Return the problem with the files in one line, or an empty string."""
    if not files:
        return "it holds no file"
    if len(files) > MAX_FILES:
        return f"it holds {len(files)} files; at most {MAX_FILES} are taken"
    for name in files:
        if len(name) > _LONGEST_NAME or re.fullmatch(PATTERN_FILE_NAME, name) is None or "\n" in name:
            return (
                f"{name[:80]!r} is no name of a file: letters, digits, _ . and -, beginning with a letter, digit or _"
            )
    total = sum(len(content) for content in files.values())
    if total > MAX_BYTES:
        return f"its files hold {total} bytes; at most {MAX_BYTES} are taken"
    return ""
