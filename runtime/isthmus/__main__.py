"""``python -m isthmus`` is the ``isthmus`` command."""

from .cli import main

main()
