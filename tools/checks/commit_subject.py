"""Check of a commit message's subject, for the hook in ``.githooks``: ``commit_subject.py MESSAGE-FILE``."""

import re
import sys
from pathlib import Path

MAX_LENGTH = 72
# Words that end like a past tense, a participle or a third person, and are imperatives.
_IMPERATIVES = (
    "access address assess bias bless bring bypass canvas class compress cross discuss dismiss embed exceed express"
    " feed focus guess miss need pass ping press process proceed progress seed shed shred speed spring string suppress"
    " swing toss trespass witness"
)
# Written by git itself.
_GENERATED = re.compile(r"(Merge|Revert|fixup!|squash!|amend!) ")


def faults(message: str) -> list[str]:
    """Return what is wrong with the subject, which is the first line of ``message`` that is no comment."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = lines[0] if lines else ""
    if not subject.strip():
        return ["the subject is empty"]
    if _GENERATED.match(subject):
        return []
    found = []
    if len(subject) > MAX_LENGTH:
        found.append(f"the subject has {len(subject)} characters, at most {MAX_LENGTH} are allowed: use the body")
    if subject.endswith("."):
        found.append("the subject ends with a period")
    first = re.split(r"\W", subject, maxsplit=1)[0]
    if re.search(r"(ed|ing|s)$", first.lower()) and first.lower() not in _IMPERATIVES.split():
        found.append(f'the subject begins with "{first}": use the imperative, as in "Add a codec"')
    if len(lines) > 1 and lines[1].strip():
        found.append("the second line is not empty: it separates the subject from the body")
    return found


def main() -> int:
    """Print the faults of the message in the file named on the command line and return the exit code."""
    found = faults(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for fault in found:
        print(f"commit message: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
