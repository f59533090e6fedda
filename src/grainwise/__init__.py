"""grainwise: learn which compression each layer of a trained PyTorch network takes."""
