"""Files of the state directory: checkpoints and round records."""
