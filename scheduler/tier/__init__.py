"""The disk tier of the prefix cache: records of pages in files, and the engine's use of them."""
