"""An OpenAI-compatible server: protocol, the engine's thread, the application."""
