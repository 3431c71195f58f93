"""Software that the lab installs or builds, and the cache of its results."""
