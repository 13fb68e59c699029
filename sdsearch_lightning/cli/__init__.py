"""The commands: what `__main__` hands an argument list to. Nothing is imported here, so that --help stays cheap."""
