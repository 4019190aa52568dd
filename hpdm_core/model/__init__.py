"""The network: backbone, conditioning, context fusion, and the joint pass of entries through the blocks."""
