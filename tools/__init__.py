"""Development tools: the documentation's generated reference, releases, and the builder of the container images."""
