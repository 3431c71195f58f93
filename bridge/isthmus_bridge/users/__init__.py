"""Pools of other local users. Operations as another user go through sudo to :mod:`.helper`."""
