"""From any kind of image to RGB pixels."""
