"""Tokenizers, quantisers, dynamics, heads and networks that systems share."""
