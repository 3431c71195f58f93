"""Entry point of ``python -m isthmus``, the ``isthmus`` command."""

from .cli import main

main()
