"""What lm-eval's logs say of a model, whoever made them and with whichever version: start reading at `folder`."""
