"""What a call of each op costs the processor that launches it."""
