"""Faults of every kind, caused on purpose in a whole fleet, and what must hold after each of them: `make faults`."""
