"""Several processes: what they find themselves in, how they meet, what they check and save."""
