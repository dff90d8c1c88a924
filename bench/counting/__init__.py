"""Counts what the CUDA kernels ask of the machine, without a GPU: see csrc/README.md, "Counts"."""
