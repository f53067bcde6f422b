"""Keep a fitted model in one file that is safe to open, or export it for other programs."""
