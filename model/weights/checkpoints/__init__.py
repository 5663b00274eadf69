"""Quantized checkpoints in safetensors: the parts of each matrix, a module for each layout."""
