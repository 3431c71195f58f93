"""The custom resources as typed models: FederatedJob, HPCSite and their parts."""
