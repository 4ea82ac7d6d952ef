"""Time to first token: contenders asked the same prompts in turn, over context lengths and states of the chunk store.

`kvarena bench ttft`. What is measured, and how to read it, is in `docs/benchmarks.md`.
"""
