"""The network: backbone, conditioning, context fusion, and entries through blocks."""
