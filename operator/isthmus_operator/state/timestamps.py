"""Times in the format of the Kubernetes API."""

import datetime as dt


def timestamp(moment: dt.datetime) -> str:
    """Format a time as the API server does, in UTC and whole seconds."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_timestamp(text: object) -> dt.datetime | None:
    """Parse a time from the API server; return None if it is not one."""
    if not isinstance(text, str):
        return None
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
