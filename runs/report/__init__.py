"""Curves, pictures and tables."""
