"""Slurm behind one small interface: :class:`~isthmus_bridge.slurm.model.SlurmAdapter`."""
