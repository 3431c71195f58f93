"""Files on the file system shared with the nodes, where jobs may write too."""
