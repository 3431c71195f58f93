"""Builder of the container images: `images/build --help`."""
