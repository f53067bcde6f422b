"""The stores that keep embeddings, in memory and on disk."""
