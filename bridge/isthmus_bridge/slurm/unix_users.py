"""The Unix users of this machine."""

import pwd


def uid_of(user: str) -> int | None:
    """Return the uid of a user; ``None`` if this machine does not know the user at the moment."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None
