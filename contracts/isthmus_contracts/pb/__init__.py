"""Generated protobuf and gRPC stubs (``make generate``); the ``.proto`` files beside them are the source."""
