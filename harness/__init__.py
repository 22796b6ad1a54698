"""What surrounds a run; nobody has to read it to change an algorithm."""
