"""Parts shared by the benchmarks: peers, barriers, baselines without Isthmus, and an in-process federation."""
