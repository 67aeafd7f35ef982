"""Tables, plots and pages of what was measured: `python -m bench.report`."""
