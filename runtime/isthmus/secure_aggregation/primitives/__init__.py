"""Keys, masks, and shares of secrets, from the primitives of `cryptography`."""
