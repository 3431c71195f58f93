"""The site's policy, and the decisions that follow from it."""
