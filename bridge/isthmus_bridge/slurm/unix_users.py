"""The users of this machine."""

import pwd


def uid_of(user: str) -> int | None:
    """The user's number; None: this machine does not know it, now."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None
