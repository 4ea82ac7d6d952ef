"""The servers of the arena, one spec each: a file, or a folder with a `spec.py` where the server is ours."""
