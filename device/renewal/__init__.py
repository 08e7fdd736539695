"""A new certificate over the network: what device and station say to each other, and the device's side of it."""
