"""Named-entity recognition: tagging schemes, and files of tagged sentences."""
