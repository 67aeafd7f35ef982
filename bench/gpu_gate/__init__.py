"""The GPU gate: everything that only a GPU can prove, then the figures. `python -m bench.gpu_gate`; see __main__.py."""
