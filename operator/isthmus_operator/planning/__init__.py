"""Planning: pure functions that derive the next actions and the status of a job from what was observed."""
