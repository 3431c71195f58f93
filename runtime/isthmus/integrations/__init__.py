"""Callbacks for the training loops of other libraries. Each module imports its library."""
