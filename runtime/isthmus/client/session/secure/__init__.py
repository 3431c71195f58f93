"""The client's part in secure aggregation: held updates, and the masks that cover them."""
