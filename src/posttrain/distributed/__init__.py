"""Several processes: their environment, rendezvous, checks and checkpoints; ZeRO, FSDP and split models."""
