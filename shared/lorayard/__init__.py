"""Lorayard: an asynchronous job queue for inference with LoRA adapters."""

__version__ = "0.1.0"
