"""The way from compute nodes to aggregators, for sites whose nodes cannot dial out: TLS bytes, passed on untouched."""
