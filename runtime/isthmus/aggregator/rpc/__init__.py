"""gRPC services of the aggregator: calls of clients and observers, with limits on connections, calls and rates."""
