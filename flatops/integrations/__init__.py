"""Where users already are: Lightning, Hugging Face's Trainer, timm. Nothing here is imported before it is asked for."""
