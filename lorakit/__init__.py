"""Low-rank fine-tuning that learns how much rank a model needs, and where."""

__version__ = "0.1.0"
