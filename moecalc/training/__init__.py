"""Training on CPUs with the fused kernels: energies and forces of small batches in milliseconds (docs/training.md)."""
