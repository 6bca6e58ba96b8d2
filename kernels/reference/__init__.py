"""PyTorch and NumPy in float64, the oracle of the others: a file for each public function."""
