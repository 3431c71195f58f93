"""Files on the file system that the nodes share, where jobs may write too."""
