"""Which rows make one optimizer step, and how they are laid out."""
