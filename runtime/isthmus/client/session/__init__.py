"""Connection to the aggregator: control stream, transfer of models and updates, compression."""
