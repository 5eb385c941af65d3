"""What a model is: reading, the normal form, layers, channel spaces, cuts."""
