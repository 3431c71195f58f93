"""Grafana dashboards: ``python -m charts.dashboards DIRECTORY`` writes their JSON, as ``make generate`` does."""
