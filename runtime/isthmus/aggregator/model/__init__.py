"""The global model and its wire forms: raw and encoded streams, protocol messages."""
