"""Implementations of the scan. None imports another; `rnnfast.dispatch` chooses among them."""
