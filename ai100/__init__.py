"""Multi-turn chat on KV slots (Qualcomm Cloud AI 100): every topic of a conversation keeps its slot, and a follow-up
prefills only what is new.
"""
