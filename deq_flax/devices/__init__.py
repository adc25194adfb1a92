"""Devices of a run: the mesh, what each device stores and sends, and several processes as one run."""
