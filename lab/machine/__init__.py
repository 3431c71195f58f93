"""The lab's use of its host: paths, users, processes, cgroups, and the network and mount namespaces."""
