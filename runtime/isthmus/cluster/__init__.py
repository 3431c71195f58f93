"""The command line's verbs for a cluster. They need ``pip install 'isthmus[cluster]'``."""
