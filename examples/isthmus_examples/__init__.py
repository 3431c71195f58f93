"""Ordinary PyTorch scripts, each with the four lines that make it federated."""
