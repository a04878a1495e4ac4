"""Tensors and modules: copies that share storage, tracked parameters, matrix products, memory."""
