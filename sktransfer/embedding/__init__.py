"""Images to columns."""
