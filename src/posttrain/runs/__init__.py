"""Run directories: what a stage leaves behind, how it is named, locked, recorded and proven."""
