"""Foundations: types, settings, trees, batches and loops, independent of any problem."""
