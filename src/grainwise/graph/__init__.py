"""What a model is made of: layers, couplings and blocks, statistics of its feature maps, features of its layers."""
