"""The names under which vLLM's command lines written for kvarena 0.1.0 find the connector and the middleware."""
