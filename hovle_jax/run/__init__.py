"""What keeps a run on a pod going, exact and watched: hosts, checkpoints, guards, metrics."""
