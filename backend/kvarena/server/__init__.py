"""The OpenAI-compatible HTTP server over an engine. It knows no engine: whoever implements `Engine` is served."""
