"""From a file to objects: merged, validated, keyed, built."""
