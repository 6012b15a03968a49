"""What the graph holds, as the messages and tensors of a request."""
