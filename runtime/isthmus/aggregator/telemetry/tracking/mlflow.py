"""Sink for an MLflow tracking server."""

import os
from collections.abc import Mapping
from typing import Any

from .sink import Sink

_UID = "isthmus.job_uid"
# The sink's thread retries by itself, so a call to a dead server should fail quickly. The user's settings come first.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Do not send data about the job to third parties.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


# MLflow requires this setting to write plain files, its only store that needs neither a server nor a database.
_OF_FILES = {"MLFLOW_ALLOW_FILE_STORE": "true"}


class MLflowSink(Sink):
    """Sink for one run of each job. A restarted aggregator finds it by the job's uid."""

    name = "MLflow"
    requirement = "isthmus[mlflow]"

    def __init__(self, uri: str, experiment: str, job: str, uid: str, parameters: Mapping[str, str]) -> None:
        self._uri = uri
        self._experiment = experiment
        self._job = job
        self._uid = uid
        self._parameters = parameters
        self._client: Any = None
        self._run = ""

    def open(self) -> None:
        settings = _SETTINGS | (_OF_FILES if self._uri.startswith("file:") else {})
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        experiment = self._client.get_experiment_by_name(self._experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
        found = self._client.search_runs([number], f"tags.`{_UID}` = '{self._uid}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        run = self._client.create_run(number, tags={_UID: self._uid}, run_name=self._job)
        self._run = run.info.run_id
        parameters = [Param(name, value) for name, value in self._parameters.items()]
        self._client.log_batch(self._run, params=parameters)

    def write(self, round_number: int, time: float, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(time * 1000), round_number) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, succeeded: bool, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(self._run, name, value)
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")
