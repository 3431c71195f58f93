"""Tracking in the manifest: destinations of a run's metrics besides Prometheus and rounds.jsonl."""

import re
from typing import Annotated

from pydantic import Field, field_validator

from .fields import Resource

# No user or password before the host: a manifest must not contain secrets, and its status would show them.
PATTERN_TRACKING_URI = r"^(https?://[^\s/?#@]+([/?#][^\s]*)?|file:///[^\s]*)$"
PATTERN_EXPERIMENT = r"^[^\s\x00-\x1f]([^\x00-\x1f]*[^\s\x00-\x1f])?$"


class TensorBoard(Resource):
    """Event files for TensorBoard, in tensorboard/ beside the checkpoints. Needs isthmus[tensorboard] in the image."""


class MLflow(Resource):
    """A run on an MLflow tracking server. Needs isthmus[mlflow] in the aggregator's image."""

    tracking_uri: Annotated[str, Field(max_length=1024, json_schema_extra={"pattern": PATTERN_TRACKING_URI})]
    """Address of the server: http, https, or file:/// for a directory that the aggregator can write. It must not
    contain credentials. Put these, from a Secret, into the environment of aggregator.template:
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""
    experiment: Annotated[str, Field(pattern=PATTERN_EXPERIMENT, max_length=250)] = "isthmus"
    """Name of the experiment. It is created if it does not exist."""

    @field_validator("tracking_uri")
    @classmethod
    def _is_plain_uri(cls, uri: str) -> str:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*@", uri):  # not shown: it may contain a password
            raise ValueError(
                "must not hold credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the env of"
                " aggregator.template, from a Secret"
            )
        if not re.fullmatch(PATTERN_TRACKING_URI, uri):
            raise ValueError(f"must be an http://, https:// or file:/// address, not {uri[:80]!r}")
        return uri


class Tracking(Resource):
    """Additional destinations of a run's metrics. A missing library or server never stops training."""

    tensor_board: TensorBoard | None = None
    mlflow: MLflow | None = None
