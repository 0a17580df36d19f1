"""Fine-tune a language model without forgetting, and measure what was forgotten."""

__version__ = "0.1.0"
