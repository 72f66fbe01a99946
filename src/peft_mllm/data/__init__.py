"""Data: reading and checking a user's records and images, and making batches of them."""
