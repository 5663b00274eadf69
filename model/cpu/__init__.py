"""The compiled C++ library for CPUs and the decoder that runs in it."""
