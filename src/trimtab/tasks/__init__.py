"""What is learnt: how rows become tokens, where the head sits, what the loss is."""
