"""The rounds of a job: coordination, offers, evaluation, durable results, status."""
