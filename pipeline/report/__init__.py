"""Run directory to tables and one self-contained page."""
