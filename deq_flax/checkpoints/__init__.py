"""Checkpoints of training runs: saved by Orbax, verified by checksums, retried and replaced by older ones when damaged.

`checkpoints.py` has the folder of a run, `stored_step.py` one checkpoint in it, `retry.py` saving on an unreliable disk,
`loading.py` weights from a path, and `workdir_lock.py` the lock that keeps a second run out. Only `devices` and `errors` are
needed besides.
"""
