"""Several processes: the only user of torch.distributed."""
