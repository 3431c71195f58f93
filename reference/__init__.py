"""The generated pages of the documentation: ``python -m reference docs/reference``, as ``make generate`` does."""
