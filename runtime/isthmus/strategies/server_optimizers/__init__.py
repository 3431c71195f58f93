"""Rules in which an optimizer on the server steps along the clients' mean change."""
