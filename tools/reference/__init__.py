"""Generator of the reference pages: ``python -m tools.reference docs/reference``, as ``make generate`` does."""
