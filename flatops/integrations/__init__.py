"""Integrations with Lightning, Hugging Face's Trainer and timm; import the submodule that you need."""
