"""From a configuration file to objects: merging, validation, keys, and building of the parts."""
