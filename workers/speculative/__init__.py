"""Guesses of what a text goes on with, which a step checks all at once instead of drawing one token after the other."""
