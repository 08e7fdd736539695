"""What a device has published and the broker has not accepted yet, on disk."""
