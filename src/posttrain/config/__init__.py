"""What a stage and a chain are told: read, every key known, every value checked. Imports no torch."""
