"""Named-entity recognition: tagging schemes, files of tagged sentences, alignment with sub-words, scores."""
