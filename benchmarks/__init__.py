"""Studies that measure the library through its own command line; each is a target of the Makefile."""
