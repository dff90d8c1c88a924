"""Tasks: official file formats in, datasets, losses and metrics out."""
