"""One model split over processes: tensor, pipeline and 3-D parallelism."""
