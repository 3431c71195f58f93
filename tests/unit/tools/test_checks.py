"""The checks of prose, folders and commit subjects find what the rules forbid, and nothing else."""

from pathlib import Path

import pytest

from tools.checks import folders, prose
from tools.checks.commit_subject import faults

GOOD = '''
"""Limits of a bridge."""

class Names:
    """Names of the pools."""

    @property
    def updates(self) -> int:
        """Updates received so far."""

    def send(self) -> None:
        """Send the update; `nobody` is a user's name."""
        # Long-running jobs, kept for long-running clients. The two are told apart by their index.
'''


def test_plain_prose_passes() -> None:
    assert prose.of_python(GOOD) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('"""What the parts share."""', '"What"'),
        ('class Limits:\n    """Whether it may."""', '"Whether"'),
        ('def run() -> None:\n    """The same with a timeout."""', '"The same"'),
        ('def run() -> None:\n    """Of one size."""', '"Of"'),
        ('async def run() -> None:\n    """Returns the size."""', '"Returns"'),
        ('def run() -> None:\n    """Names the pool."""', '"Names"'),
        ('class Limits:\n    """Writes the file."""', '"Writes"'),
        ('"""Sizes.\n\nWhoever asks is served.\n"""', '"Whoever"'),
        ('class Limits:\n    most: int\n    """Of one client."""', '"Of"'),
        ('SIZE = 3\n"""Bytes of a word."""', '"a word"'),
        ("x = 1  # counted anew", '"anew"'),
    ],
)
def test_what_the_rules_forbid_is_found(source: str, fault: str) -> None:
    (found,) = prose.of_python(source)
    assert fault in found.text


def test_pages_are_checked_but_not_their_code() -> None:
    page = "It counts anew.\n\n```sh\necho nobody\n```\n\nThe user `nobody`.\n\nSo many rounds.\n"
    assert [(fault.line, fault.text) for fault in prose.of_text(page)] == [(1, '"anew"'), (9, '"So many"')]


def test_a_folder_of_more_than_15_modules_is_found() -> None:
    modules = [Path(f"lab/{name}.py") for name in ("__init__", *map(str, range(15)))]
    assert folders.crowded([*modules, Path("bench/one.py")]) == []
    (found,) = folders.crowded([*modules, Path("lab/more.py")])
    assert found.startswith("lab: 16 modules")


@pytest.mark.parametrize(
    "message",
    [
        "Renew the CA with its existing key",
        "Process updates in turn\n\nIn their order. Was: none.",
        "# a comment of the editor's\nAdd a codec\n# another\n",
        "Merge branch 'main' into a branch whose name alone has far more than seventy-two characters in it",
        'Revert "Added things."',
    ],
)
def test_a_good_subject_passes(message: str) -> None:
    assert faults(message) == []


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("", "empty"),
        ("Add " + "x" * 69, "73 characters"),
        ("Add a codec.", "period"),
        ("Added a codec", '"Added"'),
        ("Adding a codec", '"Adding"'),
        ("adds a codec", '"adds"'),
        ("Add a codec\nand its test", "second line"),
    ],
)
def test_a_bad_subject_is_refused_with_the_reason(message: str, fault: str) -> None:
    (found,) = faults(message)
    assert fault in found
