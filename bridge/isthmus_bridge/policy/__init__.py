"""The policy of the site, and the decisions that follow from it."""
