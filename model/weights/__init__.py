"""Where weights come from, how files of them are read, and the linear layers that hold them."""
