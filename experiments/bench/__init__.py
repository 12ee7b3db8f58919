"""Time, memory, compile time and accuracy of hypergradients beside hand-written JAX and peers."""
