"""GGUF files (llama.cpp's format) as Hugging Face folders, checked tensor by tensor."""
