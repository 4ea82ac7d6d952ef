"""The core of KV reuse: token ids and tensors in, token ids and tensors out.

Nothing here knows a server, vLLM or a file. Shape letters used throughout:
`L` layers, `H_kv` KV heads, `T` tokens, `D` head size.
"""
