"""Built-in context fusions, allocations and backbones."""
