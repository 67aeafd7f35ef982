"""Measurements: compile gate, GPU gate, benchmarks and their report. Not part of the installed package."""
