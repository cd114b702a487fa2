"""What a run is: the typed config, one recipe file per system, logging and checkpoints. Runs lie in `runs/out/`."""
