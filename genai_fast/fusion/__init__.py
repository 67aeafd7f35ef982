"""Chains of modules that run as one fused call, and the implementations among which each call's is chosen."""
