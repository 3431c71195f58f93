"""The relay from compute nodes to aggregators, for sites whose nodes cannot dial out. It forwards TLS unchanged."""
