"""The decoder for CUDA: Triton kernels, recorded decode steps and their assembly."""
