"""Hosts made of network namespaces, guests, clients, pairs of daemons. For tests and the demo."""
