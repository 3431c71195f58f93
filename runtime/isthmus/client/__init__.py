"""Client side of a federation: the library that a training script uses."""
