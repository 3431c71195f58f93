"""Sinks for a run's numbers: TensorBoard, MLflow. Their libraries are optional, and imported in a sink's own thread."""
