"""Numba kernels, for tensors on the CPU: a file for each public function, and what they share."""
