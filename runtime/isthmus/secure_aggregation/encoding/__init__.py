"""Encoding of changes and scalars as integers whose sums stay exact."""
