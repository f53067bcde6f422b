"""From any form of a picture to RGB pixels."""
