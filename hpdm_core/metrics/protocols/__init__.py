"""Published protocols as records: what makes two numbers comparable."""
