"""Controllers: the reconcilers of jobs, sites and task logs, their work queue, and what feeds it."""
