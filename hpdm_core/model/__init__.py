"""The network: backbone blocks, conditioning, context fusion, and the model that puts them together."""
