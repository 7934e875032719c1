"""Starts and supervises runs on other machines. It needs only Python's standard library."""
