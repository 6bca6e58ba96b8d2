"""Triton kernels, for tensors on a GPU: a file for each public function, and what they share."""
