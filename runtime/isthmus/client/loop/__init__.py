"""The client's main loop over rounds, its torch.distributed ranks and its process."""
