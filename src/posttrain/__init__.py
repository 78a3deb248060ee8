"""posttrain: SFT, reward models and preference optimisation, chained on Hugging Face TRL."""

__version__ = "0.1.0"
__all__ = ["__version__"]
