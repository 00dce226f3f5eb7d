"""Jobs computed by a hosted service: Groq, or any host with an OpenAI-compatible API and a model id for each LoRA adapter."""
