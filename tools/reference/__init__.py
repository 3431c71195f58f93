"""The generated pages of the documentation: ``python -m tools.reference docs/reference``, as ``make generate`` does."""
