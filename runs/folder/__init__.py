"""What lies on disk: a run's folder, checkpoints, videos, and what a person sees meanwhile."""
