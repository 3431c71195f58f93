"""Access to Slurm through one interface, :class:`~isthmus_bridge.slurm.model.SlurmAdapter`."""
