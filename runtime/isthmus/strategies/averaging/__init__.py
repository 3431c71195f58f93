"""Rules that average the clients' weights, or their changes, with weights of the rule's choice."""
