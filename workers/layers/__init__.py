"""The modules that models are made of; each parameter says how it is split over ranks."""
