"""A chain as one HTML page, and a model card beside every result."""
