"""Training in several processes: what a launched process must find, and models that are split over processes."""
