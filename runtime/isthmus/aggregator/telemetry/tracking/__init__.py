"""Experiment tracking: TensorBoard, MLflow. Their libraries are optional and imported in each sink's thread."""
