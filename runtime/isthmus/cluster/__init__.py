"""Verbs of the command line that use a cluster. They need ``pip install 'isthmus[cluster]'``."""
