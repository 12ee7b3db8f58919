"""The ground: words, settings, trees, batches and loops, which know of no problem."""
