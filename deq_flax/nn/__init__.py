"""Layers that any model may use; import them from their modules."""
