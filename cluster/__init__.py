"""What every process agrees on, and how groups of actors live. Imports no torch."""
