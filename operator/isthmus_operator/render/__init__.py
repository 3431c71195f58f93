"""Rendering: pure builders of Kubernetes objects and of requests to bridges."""
