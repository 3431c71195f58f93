"""The script's model as the federation sees it, and tensors kept between rounds."""
