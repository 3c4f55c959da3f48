"""Low-bit weights: artifacts and the linear layers that compute with them."""
