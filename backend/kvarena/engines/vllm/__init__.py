"""The blend inside stock vLLM: a KV connector, loaded by `--kv-transfer-config`, and a plugin entry point."""
