"""Layers any model may use; import them from the modules."""
