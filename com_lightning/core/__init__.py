"""The engine: torch only. It knows nothing of Lightning, of files or of architectures."""
