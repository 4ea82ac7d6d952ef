"""Where chunk KV is kept: in this process, in an LMCache server, on every tensor-parallel rank alike."""
