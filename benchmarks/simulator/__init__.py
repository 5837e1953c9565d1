"""A cluster in virtual time: the router, the admission and the schedulers as they are, steps and bytes as figures."""
