"""This site as a party of secure aggregation: its root, and the files that it gives to its clients."""
