"""Base models: loaded, scored, drawn from; number formats; faster ways on a CPU."""
