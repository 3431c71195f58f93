"""Codecs that represent each value in fewer bits."""
