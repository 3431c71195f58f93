"""The client's side of a federation: what a training script uses."""
