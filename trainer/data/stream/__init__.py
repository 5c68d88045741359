"""Streaming pretraining data: any sample of any mixture, by number, on any number of ranks.

order (k -> shard and row of a source), mix (g -> source and its k), packing (row -> pieces of documents): pure functions; nothing is
replayed to seek, and nothing is stored per sample.
"""
