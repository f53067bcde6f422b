"""A network's graph, and where it is cut into stages."""
