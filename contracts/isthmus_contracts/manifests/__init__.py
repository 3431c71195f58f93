"""Reading, checking and writing manifests, and the CRDs generated from the models."""
