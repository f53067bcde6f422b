"""Texts: any container of strings as a sequence of texts."""
