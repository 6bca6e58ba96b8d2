"""Every kernel once on small tensors, for tools that check memory accesses."""

import torch

from fastplastic import kernels


def main() -> None:
    """Run all kernels on the GPU."""
    x = torch.randn(5, 7, 9, 11, device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        z = x.contiguous(memory_format=layout)
        kernels.activation_stats(z, 1, "gelu")
        kernels.gradient_stats(z, 1)
    weights = [torch.randn(33, 17, 3, 3, device="cuda"), torch.randn(40, 300, device="cuda")]
    gradients = [torch.randn_like(weight) for weight in weights]
    names = ["first", "second"]
    kernels.parameter_stats(weights, gradients)
    chosen = kernels.select(weights, gradients, names, 100)
    laws = [kernels.Law("normal", 0.0, 0.02)] * 2
    masks = kernels.selection_masks(chosen, weights, gradients)
    kernels.resample_(weights, names, laws, masks=masks)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
