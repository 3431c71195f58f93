"""Updates of clients: bounds, permissions, validation, receive buffers, and their way into the result."""
