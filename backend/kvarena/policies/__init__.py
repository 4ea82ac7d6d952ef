"""Which reused tokens to recompute: one file per published method. Importing the package itself loads no torch."""
