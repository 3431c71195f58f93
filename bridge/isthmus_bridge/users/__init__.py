"""Pools of other local users: what must be done as one of them goes through sudo to :mod:`.helper`."""
