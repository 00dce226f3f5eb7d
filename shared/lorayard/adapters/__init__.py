"""LoRA adapters: what they are, who may use them (`registry`), and how they get from PEFT files to a worker.

`peft` reads and checks, `store` keeps by content digest, `conversion` writes GGUF for llama.cpp, `intake` does it all for a new adapter.
Those four need the `adapters` extra; this module and `registry` need only what a producer has.
"""

from lorayard.adapters.manifest import PUBLIC, BaseModel, Manifest
from lorayard.adapters.registry import AdapterRegistry

__all__ = ["PUBLIC", "AdapterRegistry", "BaseModel", "Manifest"]
