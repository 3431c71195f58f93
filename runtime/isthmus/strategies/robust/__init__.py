"""Rules that withstand clients whose updates are arbitrarily wrong."""
