"""What a training step did: numbers, a page of its tokens, a picture of them."""
