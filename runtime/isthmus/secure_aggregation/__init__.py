"""Secure aggregation: the aggregator learns the sum of the updates and no single one.

SecAgg+ (Bell et al., CCS 2020) with the checks against a malicious server of Bonawitz et al. (CCS 2017).
"""
